# Site settings, sourced by every job in slurm/: the one file to adapt. Runs in the folder where sbatch was called.
# Give account, partition, GPUs and time limit on sbatch's command line, or as SBATCH_ACCOUNT, SBATCH_PARTITION, ...

# module load cuda/13 nccl          # whatever your site needs
# export NCCL_SOCKET_IFNAME=ib0
# export COLLAB_IMAGE=/images/collab_megatron.sif   # or .sqsh: an image of the Containerfile, in place of .venv
# COLLAB_MOUNTS=(/data /scratch)    # folders that an image should see besides this one

export PYTHONUNBUFFERED=1  # a killed job's log ends where the job ended

# COLLAB_RUN: the command in front of `-m collab_megatron...`. Apptainer and enroot become that process, so the job's
# signals reach it. In an image, too, the code of this folder is the one that runs.
case ${COLLAB_IMAGE:-} in
  "")
    # the interpreter of the environment that `make install` or `make install-gpu` built
    export COLLAB_PYTHON=${COLLAB_PYTHON:-$PWD/.venv/bin/python}
    if [ ! -x "$COLLAB_PYTHON" ]; then
      echo "error: no interpreter at $COLLAB_PYTHON: run make install, submit from the repository's root, or set" \
        "COLLAB_PYTHON" >&2
      exit 2
    fi
    COLLAB_RUN=("$COLLAB_PYTHON")
    ;;
  *.sif)
    # the host's toolkit and compiler (a loaded module's) are not those of the image, which apptainer would give it
    unset CUDA_PATH CUDA_ROOT CPATH LIBRARY_PATH CC CXX
    COLLAB_RUN=(apptainer exec --nv --env CUDA_HOME=/usr/local/cuda --pwd "$PWD")
    for folder in "$PWD" ${COLLAB_MOUNTS[@]+"${COLLAB_MOUNTS[@]}"}; do COLLAB_RUN+=(--bind "$folder"); done
    COLLAB_RUN+=("$COLLAB_IMAGE" "${COLLAB_PYTHON:-/opt/collab_megatron/.venv/bin/python}")
    ;;
  *.sqsh)
    COLLAB_RUN=(enroot start --rw)
    # enroot passes nothing on by itself: keys of LLM APIs, Slurm's and NCCL's variables; not what describes the host
    for name in $(compgen -e); do
      case $name in
        PATH | HOME | PWD | OLDPWD | SHLVL | SHELL | TMPDIR | LD_* | PYTHONPATH | PYTHONHOME | VIRTUAL_ENV | _) ;;
        CUDA_HOME | CUDA_PATH | CUDA_ROOT | CPATH | LIBRARY_PATH | CC | CXX) ;;  # the host's toolkit and compiler
        *) COLLAB_RUN+=(--env "$name") ;;
      esac
    done
    for folder in "$PWD" ${COLLAB_MOUNTS[@]+"${COLLAB_MOUNTS[@]}"}; do COLLAB_RUN+=(--mount "$folder:$folder"); done
    # enroot has no option for the working directory
    COLLAB_RUN+=("$COLLAB_IMAGE" sh -c 'cd "$0" && exec "$@"' "$PWD")
    COLLAB_RUN+=("${COLLAB_PYTHON:-/opt/collab_megatron/.venv/bin/python}")
    ;;
  *)
    echo "error: COLLAB_IMAGE=$COLLAB_IMAGE is neither a .sif (Apptainer) nor a .sqsh (enroot)" >&2
    exit 2
    ;;
esac
if [ -n "${COLLAB_IMAGE:-}" ]; then
  if [ ! -e "$COLLAB_IMAGE" ]; then echo "error: no image at COLLAB_IMAGE=$COLLAB_IMAGE" >&2; exit 2; fi
  if ! command -v "${COLLAB_RUN[0]}" >/dev/null; then
    echo "error: ${COLLAB_RUN[0]} is not installed on $(hostname), and COLLAB_IMAGE=$COLLAB_IMAGE needs it" >&2
    exit 2
  fi
fi
