# Starts a node agent on every node of the job. Sourced by jobs of several nodes, after env.sh and job.sh.
#
#   start_agents         sets JOB_ADDRESS, where the launcher listens, and JOB_KEY, which it reads from standard input
#   run_on_all_nodes     run_job (job.sh) with a launcher that uses all nodes of the job: one, or several with agents
#
# The key is random, and in no file, command line or environment: it goes to the agents on srun's standard input.

start_agents() {
  local last
  last=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
  JOB_ADDRESS=$("${COLLAB_RUN[@]}" -m collab_megatron.launch.ports "$last")
  JOB_KEY=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap \
    --kill-on-bad-exit=0 "${COLLAB_RUN[@]}" -m collab_megatron.launch.agent --launcher "$JOB_ADDRESS" <<<"$JOB_KEY" &
}

run_on_all_nodes() {
  if [ "${SLURM_JOB_NUM_NODES:-1}" -eq 1 ]; then
    run_job "$@"
    return
  fi
  start_agents
  run_job "$@" --job "$JOB_ADDRESS" <<<"$JOB_KEY"
}
