#!/usr/bin/env bash
# Tests that keep one core busy, in two lanes at the same time: the folders given, and everything else.
#
#   two_lanes.sh MARKS FOLDER ...
#
# The first lane writes to the terminal, what the second has written follows at the end. Fails if one of them fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marks=$1
shift
pytest=(.venv/bin/python -m pytest -m "$marks")
log=$(mktemp)
"${pytest[@]}" -p no:cacheprovider "${@/#/--ignore=}" >"$log" 2>&1 &
rest=$!
trap 'kill "$rest" 2>/dev/null && cat "$log"; rm -f "$log"' EXIT

echo "two lanes: $* here; everything else in $log"
failed=0
"${pytest[@]}" "$@" || failed=$?
wait "$rest" || failed=$?
cat "$log"
exit "$failed"
