"""What a checkpoint of a model consists of, tensor by tensor, and which Hugging Face tensors each is made of.

Asked of megatron itself: a model without memory (torch's meta device) says how it would be saved, so the converter and
training cannot come to differ. Megatron puts all layers into one tensor with a leading axis, experts likewise, and
writes the two halves of a gated projection apart; whatever the layout, these global tensors are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import apply_factories

from collab_megatron.model.tables import Row, rows
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.checkpoint.state import ShardedState


@dataclass(frozen=True)
class ManifestEntry:
    """One tensor that a checkpoint stores: a whole Megatron parameter or, of a gated projection, one half."""

    place: Any  # megatron's ShardedTensor: key, global shape, offset, local shape; its data is on the meta device
    row: Row
    part: int | None  # which of the row's Hugging Face tensors it is; None: all of them, joined

    @property
    def key(self) -> str:
        """Its name in the checkpoint, which it shares with the other layers' and experts'."""
        return str(self.place.key)

    @property
    def offset(self) -> tuple[int, ...]:
        """Where it begins in the global tensor of that name."""
        return tuple(self.place.global_offset)

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that it is made of."""
        return self.row.hf if self.part is None else (self.row.hf[self.part],)

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the leading axes; the vocabulary padded."""
        return tuple(self.place.local_shape)

    @property
    def num_bytes(self) -> int:
        return int(self.place.data.nbytes)


def meta_actor(folder: Path, dtype: torch.dtype, grid: RankGrid) -> Actor:
    """The whole model that `folder` describes, frozen, with parameters that have shapes and no values.

    `grid` must not cut the model. Raises UserError where config.json is not that of a supported model.
    """
    meta = torch.device("meta")
    name = cast(Literal["float32", "bfloat16"], str(dtype).removeprefix("torch."))
    with meta:
        elsewhere = replace(grid, backend=replace(grid.backend, device=meta))
        return Actor.build(folder, dtype=name, grid=elsewhere, optimizer=None, load_weights=False)


def manifest(actor: Actor) -> list[ManifestEntry]:
    """All that a checkpoint of this whole, frozen model stores, in the table's order."""
    state = ShardedState(actor, loading=False, random_states=False).tree
    apply_factories(state)
    stored = dict(_named(state))
    found = [entry for row in rows(actor.spec) for entry in _of_row(row, stored.pop(row.megatron))]
    assert not stored, f"the model saves what no row of tables.py knows: {sorted(stored)[:5]}"
    return found


def _named(state: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """(parameter, its tensors) of a nested state dict, by the innermost name."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _named(value)
        else:
            yield name, value if isinstance(value, list) else [value]


def _of_row(row: Row, stored: list[Any]) -> list[ManifestEntry]:
    assert all(isinstance(place, ShardedTensor) for place in stored), stored
    if len(stored) == 1:
        return [ManifestEntry(stored[0], row, None)]
    assert len(stored) == len(row.hf), (row, stored)
    return [ManifestEntry(place, row, part) for part, place in enumerate(stored)]
