"""Fake Megatron models on every rank of a grid, without megatron: parameters by their local names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from collab_megatron.config.sections import ParallelSection
from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import ParameterRow, rows
from collab_megatron.trainer.convert.reshape import gather


class Chunk(nn.Module):
    """One model chunk. Parameters are NaN and have the shapes that the table implies; layers know their number."""

    def __init__(self, parameters: dict[str, nn.Parameter], first_layer: int, layers: int) -> None:
        super().__init__()
        self.by_name = parameters
        numbers = range(first_layer + 1, first_layer + layers + 1)  # megatron counts from 1
        self.decoder: Any = SimpleNamespace(layers=[SimpleNamespace(layer_number=n) for n in numbers])

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.by_name.items())


@dataclass
class Rank:
    """One rank's place and model."""

    grid: Any  # what the converter reads of a RankGrid
    chunks: list[Chunk]


def make_ranks(spec: ModelSpec, parallel: ParallelSection) -> list[Rank]:
    """Every combination of tensor-, pipeline- and expert-parallel rank (data ranks that differ in nothing: one)."""
    ranks = []
    for pp_rank in range(parallel.pipeline):
        for ep_rank in range(parallel.expert):
            for tp_rank in range(parallel.tensor):
                grid = SimpleNamespace(
                    parallel=parallel,
                    tp_rank=tp_rank,
                    tp_size=parallel.tensor,
                    pp_rank=pp_rank,
                    pp_size=parallel.pipeline,
                    ep_rank=ep_rank,
                    ep_size=parallel.expert,
                    is_main=not (pp_rank or ep_rank or tp_rank),
                )
                chunks = [_chunk(spec, grid, parallel.pipeline * i + pp_rank) for i in range(parallel.interleave)]
                ranks.append(Rank(grid, chunks))
    return ranks


def one_rank(spec: ModelSpec) -> Rank:
    return make_ranks(spec, ParallelSection())[0]


def whole_tensors(spec: ModelSpec, ranks: list[Rank]) -> Iterator[tuple[str, Tensor]]:
    """The model's Hugging Face tensors, put together from the ranks by megatron's own numbering."""
    parallel = ranks[0].grid.parallel
    for row in rows(spec):
        holders = [rank for rank in ranks if _held(row, spec, rank) is not None]
        shards = [_held(row, spec, rank) for rank in holders if rank.grid.ep_rank == holders[0].grid.ep_rank]
        shards = shards[: parallel.tensor]  # a tied embedding is on two stages
        yield from zip(row.hf, gather(row, [shard for shard in shards if shard is not None], spec), strict=True)


def _held(row: ParameterRow, spec: ModelSpec, rank: Rank) -> Tensor | None:
    for chunk in rank.chunks:
        name = row.megatron
        if row.layer is not None:
            numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            if row.layer not in numbers:
                continue
            name = name.replace(f"layers.{row.layer}.", f"layers.{numbers.index(row.layer)}.", 1)
        if row.expert is not None:
            per_rank = spec.experts // rank.grid.ep_size
            if row.expert // per_rank != rank.grid.ep_rank:
                continue
            name = name.replace(f"local_experts.{row.expert}.", f"local_experts.{row.expert % per_rank}.")
        if name in chunk.by_name:
            return chunk.by_name[name].detach()
    return None


def _chunk(spec: ModelSpec, grid: Any, chunk: int) -> Chunk:
    """Chunk `chunk` of pipeline * interleave, in megatron's order."""
    chunks = grid.pp_size * grid.parallel.interleave
    layers, experts = spec.layers // chunks, spec.experts // grid.ep_size
    first_layer, first_expert = chunk * layers, grid.ep_rank * experts
    parameters = {}
    for row in rows(spec):
        name = row.megatron
        if row.layer is not None:
            if not first_layer <= row.layer < first_layer + layers:
                continue
            name = name.replace(f"layers.{row.layer}.", f"layers.{row.layer - first_layer}.", 1)
        elif name.startswith("embedding"):
            if chunk != 0:
                if spec.tied and chunk == chunks - 1:
                    parameters["output_layer.weight"] = _parameter(row, spec, grid.tp_size)
                continue
        elif chunk != chunks - 1:
            continue
        if row.expert is not None:
            if not first_expert <= row.expert < first_expert + experts:
                continue
            name = name.replace(f"local_experts.{row.expert}.", f"local_experts.{row.expert - first_expert}.")
        parameters[name] = _parameter(row, spec, grid.tp_size)
    return Chunk(parameters, first_layer, layers)


def _parameter(row: ParameterRow, spec: ModelSpec, tp_size: int) -> nn.Parameter:
    shapes = [[spec.dims[dim] for dim in dims] for dims in row.shapes]
    if row.is_vocab:
        shapes[0][0] = spec.padded_vocab(tp_size)
    shape = [sum(s[0] for s in shapes), *shapes[0][1:]]
    if row.cut is not None:
        shape[row.cut] //= tp_size
    return nn.Parameter(torch.full(shape, float("nan")))
