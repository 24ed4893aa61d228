"""Weight sync: from the trainer's shards into the SGLang servers, proved before a server is used.

    every trainer rank: Publisher.publish(version), at most 10 attempts

    rank 0: SyncServers               every rank: Transport                   servers
    1  find ------------------------------------------------------ who? ----> answer, or do not take part
    2  pause, init_update_group ---------------------------------- POST ----> pause; join the group    (broadcast, where
                                      join the group <-- NCCL or gloo ------> joined                    members changed)
    3  pause, begin_update --------------------------------------- POST ----> pause
    4  load bucket n --------------------------------------------- POST ----> wait for bucket n
                                      gather, pack, send n ------ tensors --> load bucket n, answer
                                      hash n, gather and pack n + 1 while n travels
    5  end_update ------------------------------------------------ POST ----> done: weights are `version`
    6  flush, checksums ------------------------------------------ POST ----> compared with the hashes of all ranks
    7  resume, probe prompt -------------------------------------- POST ----> log-probs compared with the trainer's
    8  live = members: the driver uses them from now on

A step of rank 0 goes to all servers at once and waits for all; only the POST for bucket n + 1 goes out while n is being
loaded. Transport `ipc` has no step 2. Transport `disk` replaces 2 to 5: write a folder, pause, load the folder.

Deadlines: `sync.timeout_s` for each call to a server, each wait for a bucket and each join; `engine.wait_s` for a first
server in step 1. After a failure each server has 10 s to answer a trivial question, and 20 s to come back from its wait
for a dead one (servers.py). The launcher kills and restarts the servers that do not, and the next attempt goes to the
others. A trainer rank that fails abandons the attempt, which ends every other rank's wait (attempt.py).
"""
