# Starts a node agent on every node of the job. Sourced by jobs of several nodes, after env.sh.
#
#   start_agents         sets JOB_ADDRESS, where the launcher listens, and JOB_KEY, which it reads from standard input
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
