"""Micro-batches: ragged samples as padded tensors, bounded by tokens.

Legend: B samples of the micro-batch, S padded length. Every per-token tensor is aligned with `ids`: entry [b, t] speaks
of token t (its log-probability given the tokens before it); position 0 is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSample:
    """One sequence with per-token values; shorter than any padding."""

    ids: Sequence[int]  # T tokens
    mask: Sequence[float]  # T; 1.0 where the token is trained
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)  # name -> T numbers (advantages, log-probs...)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes."""

    ids: Tensor  # [B, S] int64, right-padded with pad_id
    mask: Tensor  # [B, S] float32; 1.0 where the token is trained
    values: dict[str, Tensor]  # name -> [B, S] float32, zero on padding
    sample_indices: tuple[int, ...]  # where each row came from in the list that was split

    @property
    def num_trained_tokens(self) -> int:
        return int(self.mask.sum().item())


def split_by_tokens(
    samples: Sequence[TokenSample], *, micro_batch_tokens: int, pad_id: int, pad_multiple: int = 1
) -> list[MicroBatch]:
    """Sort by length, then cut so that rows * padded length <= micro_batch_tokens (one row may exceed it alone).

    `pad_multiple`: padded lengths are multiples of it (sequence parallel needs the tensor-parallel size).
    Raises ValueError for an empty list.
    """
    if not samples:
        raise ValueError("no samples to batch")
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].ids), i))
    batches: list[list[int]] = []
    rows: list[int] = []
    for i in order:  # ascending length: the newest row is the longest
        padded = _round_up(len(samples[i].ids), pad_multiple)
        if rows and padded * (len(rows) + 1) > micro_batch_tokens:
            batches.append(rows)
            rows = []
        rows.append(i)
    batches.append(rows)
    return [_collate([samples[i] for i in rows], tuple(rows), pad_id, pad_multiple) for rows in batches]


def empty_like(batch: MicroBatch) -> MicroBatch:
    """A batch of the same shape that trains nothing: data ranks must run equally many micro-batches."""
    return MicroBatch(
        ids=batch.ids.clone(),
        mask=torch.zeros_like(batch.mask),
        values={name: torch.zeros_like(value) for name, value in batch.values.items()},
        sample_indices=(),
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _collate(samples: list[TokenSample], indices: tuple[int, ...], pad_id: int, pad_multiple: int) -> MicroBatch:
    length = _round_up(max(len(s.ids) for s in samples), pad_multiple)
    ids = torch.full((len(samples), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(samples), length), dtype=torch.float32)
    names = samples[0].values.keys()
    values = {name: torch.zeros((len(samples), length), dtype=torch.float32) for name in names}
    for row, sample in enumerate(samples):
        end = len(sample.ids)
        ids[row, :end] = torch.tensor(sample.ids, dtype=torch.int64)
        mask[row, :end] = torch.tensor(sample.mask, dtype=torch.float32)
        for name in names:
            values[name][row, :end] = torch.tensor(sample.values[name], dtype=torch.float32)
    mask[:, 0] = 0.0  # nothing comes before the first token
    return MicroBatch(ids=ids, mask=mask, values=values, sample_indices=indices)
