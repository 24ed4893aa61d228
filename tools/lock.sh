#!/usr/bin/env bash
# Locks requirements/*.in into *.txt with the sha256 of every file of the pinned versions (Linux x86_64; Python 3.11, and
# 3.12 for GPU nodes). Run through `make lock` after a change of a .in file; commit both. Versions already in a lock stay
# unless the .in file forbids them: delete the .txt to take everything to its newest.
#   tools/lock.sh           writes the locks
#   tools/lock.sh --check   resolves again and writes nothing. Exit code 1: a pinned version is gone, or does not follow
#                           from the .in files; 3: no package index can be reached
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly UV_VERSION=0.13.9 UNREACHABLE=3
check=; hashes=(--generate-hashes)
case ${1:-} in
  --check) check=1; hashes=() ;;  # the index may get further files of a pinned version at any time
  ?*) echo "usage: tools/lock.sh [--check]" >&2; exit 2 ;;
esac

tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
cp requirements/*.in requirements/*.txt "$tmp/"
if ! { "${PYTHON:-python3}" -m venv "$tmp/venv" &&
       "$tmp/venv/bin/python" -m pip install -qq --retries 1 --timeout 10 "uv==$UV_VERSION"; }; then
  echo "lock: cannot install uv ${UV_VERSION}: no venv in ${PYTHON:-python3}, or no package index" >&2
  exit "$UNREACHABLE"
fi
# what a GPU node shares with a CPU machine starts with the same versions
[ -e "$tmp/gpu.txt" ] || cat requirements/cpu.txt requirements/dev.txt >"$tmp/gpu.txt"

versions() { grep -oE '^[a-z0-9][^ ]*==[^ ]*' "$1" || true; }

compile() {  # NAME PYTHON_VERSION [option...]: requirements/NAME.in -> requirements/NAME.txt
  local name=$1 version=$2; shift 2
  # seen from the repository's root, so that a lock names requirements/NAME.in; the output's folder holds the old lock
  if ! "$tmp/venv/bin/uv" --no-config pip compile "requirements/$name.in" --output-file "$tmp/$name.txt" --quiet \
    --only-binary :all: --python-version "$version" --python-platform x86_64-manylinux_2_34 --no-emit-index-url \
    --no-emit-find-links --custom-compile-command "make lock" "${hashes[@]}" "$@" 2>"$tmp/$name.error"; then
    cat "$tmp/$name.error" >&2
    if grep -qiE "failed to fetch|error sending request|dns error|timed out" "$tmp/$name.error"; then exit "$UNREACHABLE"; fi
    echo "lock: requirements/$name.in does not resolve" >&2
    exit 1
  fi
  if [ -n "$check" ] && ! diff <(versions "requirements/$name.txt") <(versions "$tmp/$name.txt") >&2; then
    echo "lock: requirements/$name.txt does not follow from its .in files (above): run make lock" >&2
    exit 1
  fi
  # at once: dev has cpu.txt as its constraint
  [ -n "$check" ] || cp "$tmp/$name.txt" requirements/
  echo "requirements/$name.txt: $(versions "$tmp/$name.txt" | wc -l) packages"
}
start() {  # in --check all at the same time
  if [ -n "$check" ]; then compile "$@" & running+=($!); else compile "$@"; fi
}
running=()
start cpu 3.11 --excludes requirements/excludes.txt
start dev 3.11 --excludes requirements/excludes.txt --constraint requirements/cpu.txt
start megatron-py311 3.11 --no-deps
start megatron-py312 3.12 --no-deps
start torch 3.11 --no-deps
start nodeps 3.11 --no-deps
start weights 3.11 --no-deps
start gpu 3.12 --overrides requirements/gpu-overrides.txt --no-binary transformer-engine-torch
status=0
for each in "${running[@]}"; do wait "$each" || status=$?; done
[ "$status" = 0 ] || exit "$status"

if grep -nE '^[^#]*://|^-' requirements/*.txt; then echo "a lock must not name where packages come from" >&2; exit 1; fi
