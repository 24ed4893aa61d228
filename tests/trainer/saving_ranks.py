"""The last save of a run on two ranks.

saving_ranks.py CASE, with CASE one of: alike (every rank fails alike), alone (rank 1 fails, rank 0 waits elsewhere),
clock (only rank 0's clock runs), interrupted (rank 1 has had a signal)
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from collab_megatron.config.sections import RunSection, TrainSection
from collab_megatron.errors import RunError
from collab_megatron.trainer.saving import Saving


class Saves:
    """As the real ones: collective."""

    def __init__(self) -> None:
        self.saved = 0

    def save(self, step: int, *, best_loss: float | None = None) -> None:
        dist.barrier()
        self.saved = step

    def wait(self) -> None:
        return


def main() -> None:
    case = sys.argv[1]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = int(os.environ["RANK"])
    timeout_s = 2.0 if case == "alone" else 60.0
    grid = cast(Any, SimpleNamespace(rank=rank, world_size=2, is_main=rank == 0, timeout_s=timeout_s))
    grid.cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    now = [0.0]
    saves = Saves()
    train = TrainSection(save_every_s=100)
    asked = cast(Any, SimpleNamespace(asked=case == "interrupted" and rank == 1, install=lambda: None))
    saving = Saving(saves, grid, RunSection(dir=Path("run")), train, asked, clock=lambda: now[0])
    if case == "clock":
        for _ in range(3):
            now[0] += 60.0 if rank == 0 else 0.0
            with saving.step():
                pass
            if saving.due():
                saving.save()
        print("saved", saves.saved)
        return
    began = time.monotonic()
    try:
        with saving.before_any_end():
            with saving.step():
                pass
            saving.due()
            if case == "alone" and rank == 0:
                time.sleep(6)
                dist.all_reduce(torch.zeros(1))
            raise RunError("the API is away")
    except RunError as error:
        print(error, "saved", saves.saved, "at once" if time.monotonic() - began < 30 else "late")
    except RuntimeError:
        print("the other rank is gone, saved", saves.saved)


if __name__ == "__main__":
    main()
