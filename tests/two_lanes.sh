#!/usr/bin/env bash
# `make test`: two lanes at the same time, one for each core: the whole runs and the tools, and everything else.
# The first lane writes to the terminal, what the second has written follows at the end. Fails if one of them fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=(tests/end_to_end tests/tools)
pytest=(.venv/bin/python -m pytest -m "not full")
log=$(mktemp)
"${pytest[@]}" -p no:cacheprovider "${runs[@]/#/--ignore=}" >"$log" 2>&1 &
rest=$!
trap 'kill "$rest" 2>/dev/null || true; rm -f "$log"' EXIT

echo "two lanes: ${runs[*]} here; everything else in $log"
failed=0
"${pytest[@]}" "${runs[@]}" || failed=$?
wait "$rest" || failed=$?
cat "$log"
exit "$failed"
