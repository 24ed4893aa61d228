"""The driver process: grows conversation trees and gives the trainer one batch per step. Never imports megatron.

    trainer rank 0
       |  Request: step, weight version, live engines       ^  Answer: samples and figures, or "pending"
       v                                                    |
    Listener ---> Service ------- evaluate -------> ShardEvaluator ---> figures, transcripts
                     | step                               |
                     v                                    |
               BatchCollector ---> journal, record        |
                     | advance, take                      |
                     v                                    |
               TreeScheduler                              |
                     | starts one task per tree           |
                     v                                    v
                TreeGrower ----> n replies ----> n x K futures (play_future): a Conversation each
                                                 |               |              |
                                           JournaledEngine   user simulator   judges
                                                 |               |              |
                                             EnginePool          +-- Gateway ---+
                                                 v                      v
                                           SGLang servers           LLM APIs

    part             consumes          produces              waits for                       deadline
    Listener         ZeroMQ messages   admitted requests     the next message                none: the trainer asks
    Service          Request           Answer                trees, evaluation; 2 s each     step_timeout_s (derived)
    BatchCollector   finished trees    samples, figures      nothing; `take` is polled       -
    TreeScheduler    ids of ShardPlan  running trees         budget; finished trees free it  -
    TreeGrower       TreeId            Group                 replies, then all futures       driver.group_timeout_s
    play_future      reply             scored Future         user, engine, judges in turn    driver.future_timeout_s
    JournaledEngine  token ids         Generations           room in the token limit         request_timeout_s (derived)
    Gateway          messages          LLM replies           concurrency and rate limits     deadline_s of the LLM
    ShardEvaluator   held-out tasks    figures, transcripts  its conversations               evaluation.timeout_s

Policy turns, LLM replies and batches are in the journal before they are used: a killed driver continues from there.
`driver.shards` such processes share the prompts of a step.
"""
