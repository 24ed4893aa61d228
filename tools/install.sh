#!/usr/bin/env bash
# Builds .venv: the locked packages, torch, SGLang with its CPU support, and the project itself, editable.
# Does nothing when .venv was already built from the same files; starts again if they changed or it was interrupted.
#   PYTHON=/path/to/python3.11 tools/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly VENV=.venv STAMP=.venv/.installed LOG=.venv/install.log

fail() { echo "install: $*" >&2; exit 1; }

is_311() { [ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = 3.11 ]; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_311 "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11"
    echo "$PYTHON"
    return
  fi
  for candidate in python3.11 python3 python; do
    if is_311 "$candidate"; then echo "$candidate"; return; fi
  done
  fail "no Python 3.11 found (SGLang, Megatron-Core and torch are locked for it): install it, or name it with PYTHON=..."
}

# what the environment is made of: a change of it means a new one
fingerprint() {
  { "$python" --version
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

python=$(find_python)
want=$(fingerprint)
if [ "$(cat "$STAMP" 2>/dev/null)" = "$want" ]; then echo "install: $VENV is up to date"; exit 0; fi

step "a new $VENV with $("$python" --version)"
"$python" -m venv --clear "$VENV" ||
  fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3.11-venv"
step "locked packages (requirements/cpu.txt, dev.txt)"
locked --require-hashes --only-binary :all: -r requirements/cpu.txt -r requirements/dev.txt
step "torch (requirements/torch-cpu.txt)"
if ! pip_install --no-deps --require-hashes -r requirements/torch-cpu.txt; then
  step "no CPU build of torch found: its CUDA build and NVIDIA's libraries, several GB (requirements/torch.txt)"
  locked --require-hashes -r requirements/torch.txt
  pip_install -r requirements/torch.in || fail "pip failed on NVIDIA's libraries; the log is $LOG"
fi
step "SGLang without its pins (requirements/nodeps.txt), and its CPU support"
locked --require-hashes -r requirements/nodeps.txt
locked --no-build-isolation ./tools/cpu_support
step "collab_megatron, editable"
locked --no-build-isolation --editable .
echo "$want" > "$STAMP"
step "done: $(du -sh "$VENV" | cut -f1) in $VENV"
