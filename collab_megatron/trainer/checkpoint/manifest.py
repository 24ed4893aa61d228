"""Manifest of a model's checkpoint: each tensor that it stores, and the Hugging Face tensors that it is made of.

It comes from megatron itself: a model on torch's meta device, without memory, describes how it would be saved, so the
converter and training cannot differ. Megatron stacks all layers in one tensor with a leading axis, experts likewise,
and stores the two halves of a gated projection apart. These global tensors are the same under every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import apply_factories

from collab_megatron.model.tables import ParameterRow, rows
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.checkpoint.state import ShardedState


@dataclass(frozen=True)
class ManifestEntry:
    """One stored tensor: a whole Megatron parameter, or one half of a gated projection."""

    place: Any  # megatron's ShardedTensor: key, global shape, offset, local shape; its data is on the meta device
    row: ParameterRow
    part: int | None  # which of the row's Hugging Face tensors it is; None: all of them, joined

    @property
    def key(self) -> str:
        """Its name in the checkpoint, the same for all layers and experts."""
        return str(self.place.key)

    @property
    def offset(self) -> tuple[int, ...]:
        """Its first element in the global tensor of that name."""
        return tuple(self.place.global_offset)

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that it is made of."""
        return self.row.hf if self.part is None else (self.row.hf[self.part],)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without the leading axes; the vocabulary is padded."""
        return tuple(self.place.local_shape)

    @property
    def num_bytes(self) -> int:
        return int(self.place.data.nbytes)


def meta_actor(folder: Path, dtype: torch.dtype, grid: RankGrid) -> Actor:
    """A frozen actor of the model in `folder` on torch's meta device: parameters have shapes and no values.

    `grid` must not cut the model. Raises UserError if config.json is not that of a supported model.
    """
    meta = torch.device("meta")
    name = cast(Literal["float32", "bfloat16"], str(dtype).removeprefix("torch."))
    with meta:
        elsewhere = replace(grid, backend=replace(grid.backend, device=meta))
        return Actor.build(folder, dtype=name, grid=elsewhere, optimizer=None, load_weights=False)


def manifest(actor: Actor) -> list[ManifestEntry]:
    """Every tensor that a checkpoint of this whole, frozen model stores, in the table's order."""
    state = ShardedState(actor, loading=False, random_states=False).tree
    apply_factories(state)
    stored = dict(_named(state))
    found = [entry for row in rows(actor.spec) for entry in _of_row(row, stored.pop(row.megatron))]
    assert not stored, f"tables.py has no row for tensors that the model saves: {sorted(stored)[:5]}"
    return found


def _named(state: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """(parameter, its tensors) of a nested state dict, by the innermost name."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _named(value)
        else:
            yield name, value if isinstance(value, list) else [value]


def _of_row(row: ParameterRow, stored: list[Any]) -> list[ManifestEntry]:
    assert all(isinstance(place, ShardedTensor) for place in stored), stored
    if len(stored) == 1:
        return [ManifestEntry(stored[0], row, None)]
    assert len(stored) == len(row.hf), (row, stored)
    return [ManifestEntry(place, row, part) for part, place in enumerate(stored)]
