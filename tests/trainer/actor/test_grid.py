"""Deadlines of the grid's process groups."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from collab_megatron.config.sections import ParallelSection
from collab_megatron.trainer.actor.grid import init_grid


class _Known(Exception):
    """Both deadlines are known now."""


def test_collectives_of_the_model_outlast_a_wait_for_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of a pipeline stage waits sync.timeout_s for an engine while the others are in a gather."""
    found: dict[str, timedelta] = {}

    def joined(*_: Any, timeout: timedelta, **__: Any) -> None:
        found["world"] = timeout

    def divided(*, distributed_timeout_minutes: float, **_: Any) -> None:
        found["model"] = timedelta(minutes=distributed_timeout_minutes)
        raise _Known

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", joined)
    monkeypatch.setattr("collab_megatron.trainer.actor.grid.parallel_state.initialize_model_parallel", divided)
    with pytest.raises(_Known):
        init_grid(ParallelSection(device="cpu", collective_timeout_s=60), seed=1, waits_s=300)
    assert found == {"world": timedelta(seconds=360), "model": timedelta(seconds=360)}
