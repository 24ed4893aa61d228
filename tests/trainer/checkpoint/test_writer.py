"""The deferred save: an error of one rank does not keep it from the barrier where the others wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from collab_megatron.trainer.checkpoint import writer
from collab_megatron.trainer.checkpoint.writer import DeferredSave


def fails(text: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, text)

    return fail


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where rank 0 went, in order; no process groups."""
    order: list[str] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(writer, "save_preprocess", lambda tree: ({}, {}))
    monkeypatch.setattr(writer.upstream, "_replace_state_dict_keys_with_sharded_keys", lambda *_: ({}, {}, {}))
    monkeypatch.setattr(writer.upstream, "mcore_to_pyt_state_dict", lambda *_: {"weight": 1})
    return order


def test_rank_0_reaches_the_barrier_even_if_it_cannot_write_the_format(
    reached: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writer, "save_config", fails("no space for metadata.json"))
    saving = DeferredSave(lambda: reached.append("before"), copy=False)
    saving.save({}, tmp_path)
    assert reached == ["before", "barrier"]
    assert isinstance(saving.failure, OSError)
    assert "no space for metadata.json" in str(saving.failure)


def test_the_first_error_is_the_one_that_is_kept(
    reached: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writer.upstream, "mcore_to_pyt_state_dict", fails("the first"))
    monkeypatch.setattr(writer, "save_config", fails("the second"))
    saving = DeferredSave(lambda: None, copy=False)
    saving.save({}, tmp_path)
    assert reached == ["barrier"]
    assert "the first" in str(saving.failure)
