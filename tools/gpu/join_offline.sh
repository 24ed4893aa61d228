#!/usr/bin/env bash
# Joins the pieces of tools/pack_offline.sh on the GPU machine and installs them on top of the machine's own torch.
#   bash join.sh [--unpack-only] GROUP ...       next to the pieces; INTO=folder (default: here) gets the result
# The environment is INTO/.venv-gpu, the project INTO/collab_megatron. A group whose pieces are incomplete is refused.
set -euo pipefail
from=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
into=${INTO:-$PWD}
python=${PYTHON:-python3}

fail() { echo "join: $*" >&2; exit 2; }

unpack_only=
if [ "${1:-}" = --unpack-only ]; then unpack_only=1; shift; fi
here=$(cd "$from" && for sums in *.sha256; do printf '%s ' "${sums%.sha256}"; done)
[ $# -gt 0 ] || fail "name the groups that have arrived, of: $here"
mkdir -p "$into"

for group in "$@"; do
  [ -e "$from/$group.sha256" ] || fail "there is no $from/$group.sha256: carry this group over"
  (cd "$from" && sha256sum --check --quiet "$group.sha256") ||
    fail "a piece of $group is missing or damaged: carry $group.tar.* over again"
  cat "$from/$group".tar.* | tar -C "$into" -xf -
  echo "join: $group unpacked"
done
[ -z "$unpack_only" ] || exit 0

venv=$into/.venv-gpu
[ -e "$venv/bin/python" ] || "$python" -m venv --without-pip "$venv"
# the machine's packages, torch and pip among them, behind the new ones. Not --system-site-packages: where the machine's
# Python is itself a virtual environment, that shows only the packages of its base
folder=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import site
print("import site", *(f"site.addsitedir({path!r})" for path in site.getsitepackages()), sep="; ")' \
  > "$folder/machine.pth"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --no-index --no-deps --no-build-isolation "$@"; }

shopt -s nullglob
wheels=("$into"/wheels/*.whl)
[ ${#wheels[@]} -eq 0 ] || pip --quiet "${wheels[@]}"
# transformer-engine looks for NVIDIA's libraries in its own environment only (2.20.2, common/__init__.py)
nvidia=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null) || nvidia=
[ -z "$nvidia" ] || [ -e "$folder/nvidia" ] || ln -s "$nvidia" "$folder/nvidia"
[ ! -d "$into/collab_megatron" ] || pip --quiet --editable "$into/collab_megatron"
for source in "$into"/source/transformer_engine_torch-*; do
  # not by an import: its library alone finds no symbols of transformer-engine's core
  "$venv/bin/python" -c 'from importlib.metadata import version; version("transformer-engine-torch")' 2>/dev/null &&
    continue
  [ -d "$folder/nvidia" ] ||
    fail "torch's NVIDIA packages are not there, whose headers transformer-engine needs"
  echo "join: compiling transformer-engine for torch; this takes minutes"
  CPATH="$folder/nvidia/cudnn/include:$folder/nvidia/nccl/include${CPATH:+:$CPATH}" NVTE_FRAMEWORK=pytorch \
    NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 MAX_JOBS="${MAX_JOBS:-$(nproc)}" pip "$source"
done
"$venv/bin/python" -c 'import torch; print("join: torch", torch.__version__, "and", torch.cuda.device_count(), "GPUs")'
cat <<TEXT
join: done. Next:
  cd $into/collab_megatron
  export SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
  export LD_LIBRARY_PATH=$folder/nvidia/cudnn/lib  # else transformer-engine takes the system's cuDNN, not torch's
  export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python  # the one in Rust reads dtypes of torch 2.11 wrongly
  $venv/bin/python tools/gpu_check.py --engine-args="--attention-backend triton --sampling-backend pytorch \\
    --disable-cuda-graph --grammar-backend none"
TEXT
