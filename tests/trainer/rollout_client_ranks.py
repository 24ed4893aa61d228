"""What every rank gets from the rollout client: a batch, an error that no engine is left, an evaluation.

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
    rollouts = RolloutClient(
        grid, driver_addresses=[sys.argv[1]], driver_token=b"secret", step_timeout_s=30, eval_timeout_s=30
    )
    engines = ["http://a", "http://b"] if rank == 0 else []
    print(rollouts.next_batch(0, 0, engines, 0).metrics, rollouts.take_lost(), rollouts.take_lost())
    try:
        rollouts.next_batch(1, 1, engines, 0)
    except NoEngineLeft as error:
        print(error, rollouts.take_lost())
    print(rollouts.evaluate(1, 1, engines), rollouts.take_lost())
    rollouts.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
