# Site settings, sourced by every job in slurm/: the one file to adapt. Runs in the folder where sbatch was called.
# Give account, partition, GPUs and time limit on sbatch's command line, or as SBATCH_ACCOUNT, SBATCH_PARTITION, ...

# module load cuda/13 nccl          # whatever your site needs
# export NCCL_SOCKET_IFNAME=ib0

# the interpreter of the environment that `make install` built, or of a container
export COLLAB_PYTHON=${COLLAB_PYTHON:-$PWD/.venv/bin/python}
export PYTHONUNBUFFERED=1  # a killed job's log ends where the job ended

if [ ! -x "$COLLAB_PYTHON" ]; then
  echo "error: no interpreter at $COLLAB_PYTHON: run make install, submit from the repository's root, or set COLLAB_PYTHON" >&2
  exit 2
fi
