"""Placement of the table's rows on the rank grid, and the parameters of this rank.

Layers are split evenly over pipeline * interleave model chunks in megatron's order: chunk c belongs to stage
c % pipeline. The embedding is on the first stage, final norm and output projection on the last. If embedding and output
projection share a weight, the last of several stages has a copy of the embedding, which megatron keeps equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import EMBEDDING, OUTPUT, ParameterRow, canonical_name, rows

if TYPE_CHECKING:
    from collab_megatron.trainer.actor.grid import RankGrid

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")


def stage_of(row: ParameterRow, spec: ModelSpec, *, pipeline: int, interleave: int = 1) -> int:
    """The pipeline stage that owns the row; for a tied embedding, the first."""
    if row.layer is not None:
        layers_per_chunk = spec.layers // (pipeline * interleave)
        return row.layer // layers_per_chunk % pipeline
    return 0 if row.megatron == EMBEDDING.megatron else pipeline - 1


def expert_owner(row: ParameterRow, spec: ModelSpec, *, expert_parallel: int) -> int:
    """The expert-parallel rank that holds the row's expert."""
    assert row.expert is not None, f"{row.megatron} belongs to no expert"
    return row.expert // (spec.experts // expert_parallel)


def local_rows(spec: ModelSpec, grid: RankGrid) -> Iterator[ParameterRow]:
    """The rows of this rank's parameters, whole or cut, in the table's order."""
    stages = {"pipeline": grid.pp_size, "interleave": grid.parallel.interleave}
    for row in rows(spec):
        copied_here = spec.tied and row.megatron == EMBEDDING.megatron and grid.pp_rank == grid.pp_size - 1
        if stage_of(row, spec, **stages) != grid.pp_rank and not copied_here:
            continue
        if row.expert is not None and expert_owner(row, spec, expert_parallel=grid.ep_size) != grid.ep_rank:
            continue
        yield row


def local_parameters(chunks: Sequence[nn.Module], spec: ModelSpec, grid: RankGrid) -> dict[str, nn.Parameter]:
    """The table's Megatron name -> this rank's parameter, for its (unwrapped) model chunks.

    Layers and experts are numbered over the whole model. The last stage's copy of a tied embedding has the embedding's
    name. Asserts that the table places each parameter of the chunks on this rank.
    """
    first_expert = grid.ep_rank * (spec.experts // grid.ep_size)
    found: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        decoder: Any = chunk.decoder
        layers = [layer.layer_number - 1 for layer in decoder.layers]  # megatron counts from 1, over the whole model
        for local_name, parameter in chunk.named_parameters():
            name = _global_name(canonical_name(local_name), layers, first_expert)
            if spec.tied and name == OUTPUT.megatron:
                name = EMBEDDING.megatron
            assert name not in found, f"two parameters of this rank are {name}"
            found[name] = parameter
    unknown = found.keys() - {row.megatron for row in local_rows(spec, grid)}
    assert not unknown, f"parameters without a row in tables.py: {sorted(unknown)[:5]}"
    return found


def _global_name(name: str, layers: Sequence[int], first_expert: int) -> str:
    name = _LAYER.sub(lambda match: str(layers[int(match[0])]), name)
    return _EXPERT.sub(lambda match: str(first_expert + int(match[0])), name)
