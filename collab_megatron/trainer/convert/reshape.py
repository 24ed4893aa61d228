"""Join tensors into Megatron's fused parameters and split them again. Pure tensor functions, all exact.

Legend: heads and kv_heads are those of this rank or both of the whole model; H are trailing dimensions (the hidden size
of a weight, nothing for a bias). Upstream: megatron/core/transformer/attention.py (query heads of a group before its
key and value) and mlp.py (gate before up).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import ParameterRow


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, *, kv_heads: int, head_dim: int) -> Tensor:
    """[heads*head_dim, H], [kv_heads*head_dim, H] twice -> [(heads + 2*kv_heads)*head_dim, H], by key/value head."""
    tail = q.shape[1:]
    group = q.shape[0] // (kv_heads * head_dim)
    parts = (
        q.reshape(kv_heads, group * head_dim, *tail),
        k.reshape(kv_heads, head_dim, *tail),
        v.reshape(kv_heads, head_dim, *tail),
    )
    return torch.cat(parts, dim=1).reshape(-1, *tail)


def split_qkv(fused: Tensor, *, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of merge_qkv."""
    tail = fused.shape[1:]
    grouped = fused.reshape(kv_heads, -1, *tail)
    queries = grouped.shape[1] - 2 * head_dim
    q, k, v = grouped.split([queries, head_dim, head_dim], dim=1)
    return q.reshape(-1, *tail), k.reshape(-1, *tail), v.reshape(-1, *tail)


def join(row: ParameterRow, parts: Sequence[Tensor], spec: ModelSpec, tensor_parallel: int) -> Tensor:
    """One rank's slices of the row's Hugging Face tensors -> that rank's Megatron parameter."""
    if row.join == "qkv":
        q, k, v = parts
        return merge_qkv(q, k, v, kv_heads=spec.kv_heads // tensor_parallel, head_dim=spec.head_dim)
    if row.join == "gate_up":
        return torch.cat(list(parts), dim=0)
    return parts[0]


def split(row: ParameterRow, parameter: Tensor, spec: ModelSpec, tensor_parallel: int) -> tuple[Tensor, ...]:
    """The inverse of `join`: one rank's Megatron parameter -> its slices of the row's Hugging Face tensors."""
    if row.join == "qkv":
        return split_qkv(parameter, kv_heads=spec.kv_heads // tensor_parallel, head_dim=spec.head_dim)
    if row.join == "gate_up":
        return parameter.chunk(2, dim=0)
    return (parameter,)


def parts_of(row: ParameterRow, shards: Sequence[Tensor], spec: ModelSpec) -> list[tuple[Tensor, ...]]:
    """All tensor-parallel ranks' parameters, in rank order -> for each Hugging Face tensor of the row its unpadded
    parts along `row.cut`. Copies only q, k and v, which the fused layout interleaves.

    For a row that is not cut, one rank's parameter is enough.
    """
    if row.cut is None:
        return [(tensor,) for tensor in split(row, shards[0], spec, 1)]
    found = [tuple(parts) for parts in zip(*(split(row, shard, spec, len(shards)) for shard in shards), strict=True)]
    if not row.is_vocab:
        return found
    (parts,) = found
    per_rank = parts[0].shape[0]
    kept = (part[: max(0, spec.vocab - rank * per_rank)] for rank, part in enumerate(parts))
    return [tuple(part for part in kept if part.shape[0])]


def gather(row: ParameterRow, shards: Sequence[Tensor], spec: ModelSpec) -> tuple[Tensor, ...]:
    """As parts_of, joined: the row's whole, contiguous Hugging Face tensors. A single part shares its memory."""
    return tuple(
        (torch.cat(parts, dim=row.cut or 0) if len(parts) > 1 else parts[0]).contiguous()
        for parts in parts_of(row, shards, spec)
    )
