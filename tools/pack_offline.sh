#!/usr/bin/env bash
# Packs what a GPU machine without an index needs, in pieces of at most 60 MB, with the script that joins them there.
#   tools/pack_offline.sh OUT [GROUP ...]     groups: tree base engine te demo; default: all but demo
#   there: bash join.sh GROUP ...             installs what has arrived into .venv-gpu, on top of the machine's torch
#
# tree    this commit
# base    the locked packages for trainer and driver, and pytest
# engine  SGLang and its kernels for sm_90
# te      transformer-engine: the core wheel, and its torch part: source that is compiled there, or with TE_BUILD=1 here
# demo    data and SFT model of DEMO; not needed for tools/gpu_check.py, which makes its own
#
# Environment variables, with defaults below: PYTHON (any, with pip; for te an environment with torch), TARGET
# (Python there), PIECE_MB, HAVE (packages that are there already), LOCKS, TEST_LOCK, TEST_PACKAGES (what to
# bring), UNUSED, SGLANG, KERNEL, ENGINE_EXTRA, TE, TE_SOURCE (a file, if pip cannot fetch it; a wheel is not
# compiled), TE_BUILD, ARCHITECTURE, DEMO (a run of make demo).
#
# TE_BUILD=1 spares the GPU machine minutes: 25 on two cores here, none there. PYTHON must then be the Python that is
# there, in an environment with the torch that is there (pip install torch==2.11.0) and, of the same CUDA, the packages
# nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-profiler-api nvidia-nvvm, ninja, pybind11 and wheel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=${PYTHON:-python3} TARGET=${TARGET:-3.12} PIECE_MB=${PIECE_MB:-60} DEMO=${DEMO:-runs/demo}
# what images with torch usually have and is large, each with what must match it
readonly HAVE=${HAVE:-torch triton transformers tokenizers safetensors accelerate huggingface-hub hf-xet numpy \
  scipy pandas pyarrow sympy mpmath networkx psutil setuptools sentencepiece tiktoken regex requests einops lxml \
  matplotlib contourpy cycler fonttools kiwisolver pyparsing pillow python-dateutil \
  tensorboard tensorboard-data-server absl-py grpcio markdown protobuf werkzeug \
  aiohttp aiohappyeyeballs aiosignal frozenlist multidict propcache yarl uvloop}
# all of these, where the second one exists
readonly LOCKS=${LOCKS:-requirements/cpu.txt requirements/megatron-py${TARGET/./}.txt}
# and of this lock what runs tests/gpu
readonly TEST_LOCK=${TEST_LOCK-requirements/dev.txt}
readonly TEST_PACKAGES=${TEST_PACKAGES:-pytest pytest-timeout pytest-asyncio pluggy iniconfig}
# asked for by packages above, and not imported by anything that runs here
readonly UNUSED=${UNUSED:-boto3 botocore s3transfer pycountry airportsdata pycryptodomex}
readonly SGLANG=${SGLANG:-sglang==0.5.23}
readonly KERNEL=${KERNEL:-sglang-kernel==0.4.5}  # built for torch 2.11.0
# for colocated engines; for SGLang's config modules, to go with torch 2.11; for the device's memory
readonly ENGINE_EXTRA=${ENGINE_EXTRA:-torch-memory-saver==0.0.10 torchvision==0.26.0 nvidia-ml-py==13.615.71}
readonly TE=${TE:-2.20.2} TE_SOURCE=${TE_SOURCE:-} TE_BUILD=${TE_BUILD:-} TE_CUDA=13.0
readonly ARCHITECTURE=${ARCHITECTURE:-90}  # the GPU's, 90 for sm_90; code for others is left out
# not loaded by an engine with the triton attention backend on one sm_90 GPU; srt/multimodal is, by configs of models
readonly SGLANG_WITHOUT='sglang/(multimodal_gen|rust|test|benchmark)/'
readonly KERNEL_WITHOUT='(flash_ops|sm100/)'  # the large ones that this engine does not load

fail() { echo "pack_offline: $*" >&2; exit 2; }

[ $# -ge 1 ] || fail "name a folder for the pieces: tools/pack_offline.sh OUT [tree base engine te demo]"
out=$1; shift
[ ! -e "$out" ] || [ -z "$(ls -A "$out")" ] || fail "$out is not empty: choose another folder, or remove it"
groups=("$@"); [ $# -gt 0 ] || groups=(tree base engine te)
for group in "${groups[@]}"; do
  case $group in tree|base|engine|te|demo) ;; *) fail "$group is none of the groups tree base engine te demo" ;; esac
done
mkdir -p "$out"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

platforms=()  # of a machine with glibc 2.34; pip adds no older ones by itself
for tag in manylinux_2_{34,31,28,27,26,24,17,12,5}_x86_64 manylinux{2014,2010,1}_x86_64 linux_x86_64; do
  platforms+=(--platform "$tag")
done

download() {  # FOLDER ARGUMENT...: wheels for the target, nothing resolved
  local folder=$1; shift
  "$PYTHON" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --dest "$folder" \
    --python-version "$TARGET" --implementation cp --abi "cp${TARGET/./}" --abi abi3 --abi none \
    "${platforms[@]}" "$@" ||
    fail "pip found no wheel for Python $TARGET: $*"
}

# blocks of a lock ("name==version \" and its hashes): all but the named packages, or only those
lock_blocks() {  # LOCK NAMES WANTED: 1 keeps the blocks of the names, 0 all others
  awk -v names=" $2 " -v wanted="$3" '/^[a-zA-Z0-9]/ {
    name = $1; sub(/==.*/, "", name); keep = (index(names, " " name " ") > 0) == wanted
  } keep' "$1"
}

pack() {  # GROUP FOLDER: pieces of the folder's tar, and their sums
  tar --sort=name --owner=0 --group=0 -C "$2" -cf - . | split --bytes="${PIECE_MB}MB" -d -a 2 - "$out/$1.tar."
  (cd "$out" && sha256sum "$1".tar.* > "$1.sha256")
  printf 'pack_offline: %-7s %s in %s pieces\n' "$1" "$(du -ch "$out/$1".tar.* | tail -n 1 | cut -f1)" \
    "$(find "$out" -name "$1.tar.*" | wc -l)"
}

tree() { git archive --format=tar --prefix=collab_megatron/ HEAD | tar -C "$1" -xf -; }

base() {
  local lock
  for lock in $LOCKS; do
    [ -e "$lock" ] || continue
    lock_blocks "$lock" "$HAVE $UNUSED" 0 > "$work/lock.txt"
    download "$1/wheels" --require-hashes -r "$work/lock.txt"
  done
  [ -n "$TEST_LOCK" ] || return 0
  lock_blocks "$TEST_LOCK" "$TEST_PACKAGES" 1 > "$work/lock.txt"
  download "$1/wheels" --require-hashes -r "$work/lock.txt"
}

engine() {
  download "$1/wheels" "$SGLANG"
  download "$1/wheels" "$KERNEL"
  local extra
  for extra in $ENGINE_EXTRA; do download "$1/wheels" "$extra"; done
  "$PYTHON" tools/gpu/trim_wheel.py "$1"/wheels/sglang-*.whl --without "$SGLANG_WITHOUT"
  "$PYTHON" tools/gpu/trim_wheel.py "$1"/wheels/sglang_kernel-*.whl --without "$KERNEL_WITHOUT" \
    --architecture "$ARCHITECTURE"
}

te() {
  download "$1/wheels" "transformer-engine-cu13==$TE"
  download "$1/wheels" "transformer-engine==$TE"
  download "$1/wheels" nvdlfw-inspect==0.2.2  # imported by it
  "$PYTHON" tools/gpu/trim_wheel.py "$1"/wheels/transformer_engine_cu13-*.whl --architecture "$ARCHITECTURE"
  case $TE_SOURCE in *.whl) cp "$TE_SOURCE" "$1/wheels/"; return ;; esac
  mkdir -p "$1/source"
  if [ -n "$TE_SOURCE" ]; then cp "$TE_SOURCE" "$1/source/"; else te_source "$1/source"; fi
  [ -z "$TE_BUILD" ] || { te_build "$1"; rm -r "$1/source"; }
}

te_source() {  # FOLDER
  mkdir -p "$work"/cuda/{bin,include} "$work/shim"
  # pip runs setup.py for a source's metadata; that asks torch and a toolkit for CUDA's version, and compiles nothing
  printf '#!/bin/sh\necho "Cuda compilation tools, release %s, V%s.48"\n' {,}"$TE_CUDA" > "$work/cuda/bin/nvcc"
  chmod +x "$work/cuda/bin/nvcc"
  printf 'import torch\ntorch.version.cuda = torch.version.cuda or "%s"\n' "$TE_CUDA" > "$work/shim/sitecustomize.py"
  CUDA_HOME="$work/cuda" PYTHONPATH="$work/shim" NVTE_FRAMEWORK=pytorch "$PYTHON" -m pip --disable-pip-version-check \
    download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$1" "transformer-engine-torch==$TE" ||
    fail "pip could not fetch transformer-engine-torch $TE: let PYTHON have torch, or give its source as TE_SOURCE"
}

te_build() {  # FOLDER: its source becomes a wheel; C++ against torch and headers of NVIDIA's packages, no GPU
  local nvidia
  nvidia=$("$PYTHON" -c 'import nvidia; print(list(nvidia.__path__)[0])') && [ -x "$nvidia/cu13/bin/nvcc" ] ||
    fail "TE_BUILD=1 needs torch and nvidia-cuda-nvcc in the environment of PYTHON=$PYTHON: see this script's head"
  echo "pack_offline: compiling transformer-engine for torch; this takes minutes"
  CUDA_HOME="$nvidia/cu13" PATH="$(dirname "$PYTHON"):$nvidia/cu13/bin:$PATH" \
    CPATH="$nvidia/cudnn/include:$nvidia/nccl/include:$nvidia/cu13/include:$nvidia/cu13/include/cccl" \
    NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    "$PYTHON" -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$1/wheels" "$1"/source/* || fail "transformer-engine-torch $TE could not be compiled: see above"
}

demo() {
  [ -d "$DEMO/sft_hf" ] || fail "there is no $DEMO/sft_hf: run make demo first, or set DEMO to its folder"
  mkdir -p "$1/collab_megatron/runs/demo/data"
  cp -r "$DEMO/sft_hf" "$1/collab_megatron/runs/demo/"
  cp "$DEMO"/data/*.parquet "$1/collab_megatron/runs/demo/data/"
}

cp tools/gpu/join_offline.sh "$out/join.sh"  # first: a group that fails leaves what is packed of use
for group in "${groups[@]}"; do
  mkdir "$work/$group"
  "$group" "$work/$group"
  pack "$group" "$work/$group"
done
echo "pack_offline: carry $out over, then: bash join.sh ${groups[*]}"
