"""What every rank gets from the inbox: a batch, the news that no engine is left, and the batch of the second try.

python rollout_client_ranks.py DRIVER_ADDRESS
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any, cast

import torch.distributed as dist

from collab_megatron.errors import NoEngineLeft
from collab_megatron.trainer.rollout_client import RolloutClient


def main() -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    grid = cast(Any, SimpleNamespace(is_main=rank == 0, world_size=2))
    inbox = RolloutClient(
        grid, driver_addresses=[sys.argv[1]], driver_token=b"secret", step_timeout_s=30, eval_timeout_s=30
    )
    engines = ["http://a", "http://b"] if rank == 0 else []
    print(inbox.next_batch(0, 0, engines, 0).metrics, inbox.take_lost(), inbox.take_lost())
    try:
        inbox.next_batch(1, 1, engines, 0)
    except NoEngineLeft as error:
        print(error, inbox.take_lost())
    print(inbox.evaluate(1, 1, engines), inbox.take_lost())
    inbox.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
