"""The trainer ranks: the parts of the step loops in train_rl.py, train_sft.py and train_dpo.py.

One RL step, the same code on every rank:

      rollout driver                                        engines
            |  RolloutBatch                                    ^  weights of the new version
            v                                                  |
    +------------------+   +----------+   +--------+   +-------------+   +-----------+   +------------+   +----------+
    | wait_for_rollout |-->| logprobs |-->| update |-->| weight_sync |-->| reporting |-->| checkpoint |-->| evaluate |
    +------------------+   +----------+   +--------+   +-------------+   +-----------+   +------------+   +----------+
       rollout_client        rl_step        rl_step     sync.publisher    rl_reporter        saving         evaluation_
       engines               actor          actor       engines                              checkpoint     schedule

    phase             consumes                       produces                      waits for
    wait_for_rollout  step, URLs of live engines     RolloutBatch on every rank    the driver's rollouts of the step
    logprobs          this rank's share of the       log-probs of the reference,   ranks that share a model (tensor,
                      batch (rank_batch)             of the policy if mini-batches pipeline, context)
    update            micro-batches with log-probs   new weights, metrics          all ranks: gradients, their norm
    weight_sync       the weights, roster of engines engines on the new weights    the engines, and their proof
    reporting         metrics and times of the step  dashboard, progress line      rank 0
    checkpoint        weights, optimizer, RNG        a folder, if one is due       all ranks and the disk
    evaluate          live engines, if it is due     held-out figures              the driver's held-out conversations

All ranks meet in every phase except logprobs. Rank 0 alone asks the driver, controls the engines and reports to the
user. What it does for the others goes through actor/agreement.py: its result, or its error, reaches every rank, and no
rank waits for one that has raised. saving.py also saves before whatever ends the run. With online_dpo the logprobs and
update phases are those of online_dpo.py. SFT and DPO on a dataset have no engines and wait for no rollouts: their loop
is supervised/loop.py.
"""
