"""Entries of a state dict that are no tensors, under the names that transformer-engine's layers give them."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.checkpoint.state import ShardedState

EXPERTS = 3


class GroupedLinear(nn.Module):
    """Parameters, extra state and sharded names of megatron's TEGroupedLinear (0.16.1)."""

    def __init__(self) -> None:
        super().__init__()
        for expert in range(EXPERTS):
            self.register_parameter(f"weight{expert}", nn.Parameter(torch.full((2,), float(expert))))

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("no extra state is in a checkpoint")


class Chunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = GroupedLinear()
        self.norm = nn.Linear(2, 2, bias=False)
        self.norm.register_buffer("scale", torch.ones(1))

    def sharded_state_dict(self, metadata: Any) -> dict[str, Any]:
        # here: collab_megatron.trainer.actor makes megatron importable without CUDA
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        found: dict[str, Any] = {
            name: ShardedTensor.from_rank_offsets(name, value)
            for name, value in self.state_dict(keep_vars=True).items()
            if not name.endswith("_extra_state")
        }
        for expert in range(EXPERTS):
            name = f"experts._extra_state{expert or ''}"
            found[name] = ShardedObject(name, io.BytesIO(), (EXPERTS,), (expert,))
        return found


def state_of(chunk: Chunk) -> ShardedState:
    grid = SimpleNamespace(dp_cp_group=None)
    actor = SimpleNamespace(chunks=[chunk], grid=grid, optimizer=None, gather_weights=lambda: None)
    return ShardedState(cast("Actor", actor), loading=False, random_states=False)


def test_only_tensors_are_saved_and_asked_for() -> None:
    tree = state_of(Chunk()).tree["model"]["0"]
    assert set(tree) == {"norm.weight", "norm.scale", *(f"experts.weight{expert}" for expert in range(EXPERTS))}


def test_a_checkpoint_without_them_can_be_loaded() -> None:
    chunk = Chunk()
    state = state_of(chunk)
    loaded = {name: torch.full_like(entry.data, 7.0) for name, entry in state.tree["model"]["0"].items()}
    state.restore({"model": {"0": loaded}}, {})
    assert all(bool((parameter == 7.0).all()) for parameter in chunk.parameters())
    del loaded["experts.weight1"]
    with pytest.raises(AssertionError, match=r"experts\.weight1"):
        state.restore({"model": {"0": loaded}}, {})
    del loaded["norm.scale"]
    with pytest.raises(AssertionError, match=r"norm\.scale"):
        state.restore({"model": {"0": loaded}}, {})
