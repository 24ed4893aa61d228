"""The update group's settings of NCCL, which only its creation can change."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from collab_megatron.trainer.sync.attempt import Attempt
from collab_megatron.trainer.sync.update_group import HANDLING, UpdateGroup


@pytest.mark.parametrize("before", [None, "1"])
def test_the_watchdog_leaves_this_groups_errors_to_the_sync(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """By default it ends the trainer when a server dies in a broadcast. The trainer's own groups keep it."""
    seen: list[str | None] = []

    def made(*_: Any, **__: Any) -> tuple[Any, Any]:
        seen.append(os.environ.get(HANDLING))
        return object(), None

    monkeypatch.setattr(c10d, "_new_process_group_helper", made)
    monkeypatch.delenv(HANDLING, raising=False)
    if before is not None:
        monkeypatch.setenv(HANDLING, before)
    group = UpdateGroup("any", host="127.0.0.1", world_size=2, backend="gloo", timeout_s=5)
    group.join(Attempt(dist.HashStore(), number=1, rank=0, members=(), timeout_s=5))
    assert seen == ["0"]
    assert os.environ.get(HANDLING) == before
    c10d._world.pg_group_ranks.pop(group.group)
