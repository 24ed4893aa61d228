"""Micro-batches: ragged samples as padded rows or packed end to end, bounded by tokens.

Legend: B rows, S row length, T tokens of one sample. Every per-token tensor is [B, S] and aligned with `ids`: entry
[b, t] speaks of token [b, t] (its log-probability given the tokens before it); a sample's first token is never trained.
A packed micro-batch has one row (B = 1) in which samples stand end to end; whatever sums over [B, S] under the mask,
as every loss does, need not know which of the two it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

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

    ids: Tensor  # [B, S] int64; padding is pad_id, right of the tokens
    mask: Tensor  # [B, S] float32; 1.0 where the token is trained
    values: dict[str, Tensor]  # name -> [B, S] float32, zero on padding
    sample_indices: tuple[int, ...]  # where each sample came from in the list that was split
    lengths: tuple[int, ...]  # tokens of each sample, in the order of sample_indices
    packed: bool = False

    @property
    def num_trained_tokens(self) -> int:
        return int(self.mask.sum().item())

    @property
    def num_tokens(self) -> int:
        """Real tokens; padding left out."""
        return sum(self.lengths)

    @property
    def segments(self) -> tuple[int, ...]:
        """Packed: lengths of the sequences that attention keeps apart; the padding at the end is one of them."""
        tail = self.ids.shape[1] - self.num_tokens
        return (*self.lengths, tail) if tail else self.lengths

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(row, columns) of each sample, in the order of sample_indices: the flat view that hides the layout."""
        start = 0
        for row, length in enumerate(self.lengths):
            yield (0, slice(start, start + length)) if self.packed else (row, slice(0, length))
            start += length

    def per_sample(self, values: Tensor) -> list[Tensor]:
        """values [B, S] -> a [T] tensor for each sample, padding left out."""
        return [values[row, columns] for row, columns in self.spans()]

    def to(self, device: torch.device) -> MicroBatch:
        if self.ids.device == device:
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def by_predicting_position(self) -> MicroBatch:
        """Everything moved one place to the left: entry [b, t] now speaks of token t + 1, which position t predicts.

        So `ids` are the labels of the model's outputs. The last column is masked.
        """
        shifted = self._map(lambda tensor: tensor.roll(-1, dims=1))
        shifted.mask[:, -1] = 0.0
        return shifted

    def take_columns(self, columns: Tensor) -> MicroBatch:
        """The given columns of every tensor: this context-parallel rank's part of each row."""
        return self._map(lambda tensor: tensor.index_select(1, columns))

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        values = {name: change(value) for name, value in self.values.items()}
        return replace(self, ids=change(self.ids), mask=change(self.mask), values=values)


def split_by_tokens(
    samples: Sequence[TokenSample],
    *,
    micro_batch_tokens: int,
    pad_id: int,
    pad_multiple: int = 1,
    packed: bool = False,
) -> list[MicroBatch]:
    """Cut into micro-batches of at most `micro_batch_tokens` tokens, padding included (one sample may exceed it alone).

    Sorted by length. `pad_multiple`: row lengths are multiples of it (RankGrid.pad_multiple).
    Raises ValueError for an empty list.
    """
    if not samples:
        raise ValueError("no samples to batch")
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].ids), i))
    batches: list[list[int]] = []
    rows: list[int] = []
    total = 0
    for i in order:  # ascending length: the newest row is the longest
        length = len(samples[i].ids)
        longest, count = (total + length, 1) if packed else (length, len(rows) + 1)
        size = _round_up(longest, pad_multiple) * count
        if rows and size > micro_batch_tokens:
            batches.append(rows)
            rows, total = [], 0
        rows.append(i)
        total += length
    batches.append(rows)
    return [collate([samples[i] for i in rows], tuple(rows), pad_id, pad_multiple, packed) for rows in batches]


def collate(
    samples: Sequence[TokenSample], indices: tuple[int, ...], pad_id: int, pad_multiple: int, packed: bool
) -> MicroBatch:
    """All `samples` as one micro-batch."""
    lengths = tuple(len(sample.ids) for sample in samples)
    rows, longest = (1, sum(lengths)) if packed else (len(samples), max(lengths))
    shape = (rows, _round_up(longest, pad_multiple))
    batch = MicroBatch(
        ids=torch.full(shape, pad_id, dtype=torch.int64),
        mask=torch.zeros(shape, dtype=torch.float32),
        values={name: torch.zeros(shape, dtype=torch.float32) for name in samples[0].values},
        sample_indices=indices,
        lengths=lengths,
        packed=packed,
    )
    for sample, (row, columns) in zip(samples, batch.spans(), strict=True):
        batch.ids[row, columns] = torch.tensor(sample.ids, dtype=torch.int64)
        batch.mask[row, columns] = torch.tensor(sample.mask, dtype=torch.float32)
        batch.mask[row, columns.start] = 0.0  # nothing comes before the first token
        for name, target in batch.values.items():
            target[row, columns] = torch.tensor(sample.values[name], dtype=torch.float32)
    return batch


def idle_like(batch: MicroBatch, pad_multiple: int) -> MicroBatch:
    """As small a batch as can be, which trains nothing: for a rank that has less to do than its peers must see done."""
    shape = (1, pad_multiple)
    values = {name: torch.zeros(shape, dtype=value.dtype) for name, value in batch.values.items()}
    ids = batch.ids[:1, :1].cpu().expand(shape).clone()
    return MicroBatch(ids, torch.zeros(shape), values, sample_indices=(), lengths=(), packed=batch.packed)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
