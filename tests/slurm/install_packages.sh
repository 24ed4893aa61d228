#!/usr/bin/env bash
# Installs what the Slurm tests need from Debian's packages (8 small ones). Needs root; does nothing if they are there.
# Exits 1, with the reason, where it cannot.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive

missing=0
for program in munged slurmctld slurmd sbatch; do command -v "$program" >/dev/null || missing=1; done
if [ "$missing" = 0 ]; then echo "install_packages: Slurm is there: $(slurmctld -V)"; exit 0; fi
if [ "$(id -u)" != 0 ]; then echo "install_packages: not root, Slurm is not installed" >&2; exit 1; fi
if ! command -v apt-get >/dev/null; then echo "install_packages: no apt-get, Slurm is not installed" >&2; exit 1; fi

log=$(mktemp)
# policy-rc.d: the packages must not start daemons of their own; the tests start theirs
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
if ! { timeout 300 apt-get -q update && timeout 600 apt-get install -qy --no-install-recommends munge slurmctld slurmd \
       slurm-client; } > "$log" 2>&1; then
  echo "install_packages: apt-get failed: $(tail -n 3 "$log")" >&2
  exit 1
fi
rm -f "$log"
echo "install_packages: installed $(slurmctld -V)"
