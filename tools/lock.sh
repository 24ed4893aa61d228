#!/usr/bin/env bash
# Locks requirements/*.in into *.txt with the sha256 of every file of the pinned versions (Python 3.11, Linux x86_64).
# Run through `make lock` after a change of a .in file; commit both. Versions already in a lock stay unless the .in
# file forbids them: delete the .txt to take everything to its newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly UV_VERSION=0.13.9

tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.11}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq "uv==$UV_VERSION"

compile() {  # NAME [option...]: requirements/NAME.in -> requirements/NAME.txt
  local name=$1; shift
  "$tmp/venv/bin/uv" --no-config pip compile "requirements/$name.in" --output-file "requirements/$name.txt" \
    --generate-hashes --only-binary :all: --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet "$@"
  echo "requirements/$name.txt: $(grep -cE '^[a-z0-9].*==' "requirements/$name.txt") packages"
}
compile cpu --excludes requirements/excludes.txt
compile dev --excludes requirements/excludes.txt
compile torch --no-deps
compile nodeps --no-deps

if grep -nE '^[^#]*://|^-' requirements/*.txt; then echo "a lock must not name where packages come from" >&2; exit 1; fi
