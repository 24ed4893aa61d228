# Runs the program of a job so that it can save before a time limit and go on afterwards. Sourced by slurm/*.sbatch.
#
#   TERM (scancel, preemption)    passed on: the program saves within train.save_grace_s (60 s) and ends
#   USR1 (--signal=B:USR1@180)    the time limit is near: the program gets TERM, and the job is queued again
#
# Queued again is a program that was interrupted (exit code 130); not one that is done, and not one that failed, nor a job
# that ran for less than COLLAB_LEAST_S: under such a limit it would never get further. The job keeps its number and its
# log, and goes on from the newest checkpoint. This chains a long run on a partition with short limits. `sbatch
# --no-requeue` or `--signal=B:TERM@180` turns it off.

COLLAB_LEAST_S=${COLLAB_LEAST_S:-60}

run_job() {
  local child="" asked="" near_limit="" code
  trap 'asked=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
  trap 'asked=1; near_limit=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' USR1
  "$@" <&0 &  # else bash would give it /dev/null
  child=$!
  if [ -n "$asked" ]; then kill -TERM "$child" 2>/dev/null || true; fi  # a signal came before the program
  while true; do
    wait "$child" && code=0 || code=$?
    kill -0 "$child" 2>/dev/null || break  # else a signal ended the wait, not the program
  done
  trap - TERM INT HUP USR1
  if [ -z "$near_limit" ] || [ "$code" -ne 130 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    return "$code"
  fi
  if [ "$SECONDS" -lt "$COLLAB_LEAST_S" ]; then
    echo "error: job $SLURM_JOB_ID is not queued again, because it ran for $SECONDS s only: give it more time" >&2
  else
    echo "the time limit is near: job $SLURM_JOB_ID has saved and is queued again"
    scontrol requeue "$SLURM_JOB_ID" || echo "error: job $SLURM_JOB_ID was not queued again: submit it again" >&2
  fi
  return "$code"
}
