#!/usr/bin/env bash
# Installs Chromium from Debian's packages, for the tests of the viewer. Needs root; does nothing if it is there. Exits 1,
# with the reason, where it cannot.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

for program in chromium chromium-browser google-chrome; do
  if command -v "$program" >/dev/null; then echo "install_browser: $program is there"; exit 0; fi
done
if [ "$(id -u)" != 0 ]; then echo "install_browser: not root, Chromium is not installed" >&2; exit 1; fi
if ! command -v apt-get >/dev/null; then echo "install_browser: no apt-get, Chromium is not installed" >&2; exit 1; fi

log=$(mktemp)
if ! { timeout 300 apt-get -q update &&
       timeout 900 apt-get install -qy --no-install-recommends chromium fonts-dejavu-core; } > "$log" 2>&1; then
  echo "install_browser: apt-get failed: $(tail -n 3 "$log")" >&2
  exit 1
fi
rm -f "$log"
echo "install_browser: installed $(chromium --version 2>/dev/null | head -n 1)"
