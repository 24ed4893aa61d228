"""Micro-batches: ragged samples as padded rows or packed end to end, bounded by tokens.

Legend: B rows, S row length, T tokens of one sample. Every per-token tensor is [B, S] and aligned with `ids`: entry
[b, t] belongs to token [b, t] (its log-probability given the tokens before it); a sample's first token is never
trained. A packed micro-batch has one row (B = 1) with its samples end to end. A sum over [B, S] under the mask, as
every loss is, is the same for both kinds.

In a packed row the replies to one prompt can share it: the prompt's tokens are there once, followed by each reply with
the prompt's last token in front, because that token predicts a different first token in each reply. Attention lets a
reply see the prompt and itself (local/layers.py), so the results equal those of whole samples, with fewer tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

MOST_PADDING = 0.1
"""Of a pipeline's tokens: the most that of_one_length adds. It saves a message, for which the host waits, per stage and
micro-batch."""


@dataclass(frozen=True)
class TokenSample:
    """One sequence with per-token values, without padding."""

    ids: Sequence[int]  # T tokens
    mask: Sequence[float]  # T; 1.0 where the token is trained
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)  # name -> T numbers (advantages, log-probs...)
    shareable: int = 0  # leading tokens that several samples may share in a packed row; neither they nor the token
    # after them are trained

    @property
    def prefix(self) -> tuple[int, ...]:
        return tuple(self.ids[: self.shareable])


class PackedGroup(NamedTuple):
    """Samples next to each other in a packed row, with a shared prefix or none."""

    prefix: int  # tokens that they share, in front of them; 0: each is a sequence of its own
    own: tuple[int, ...]  # tokens of each, without the prefix


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass."""

    ids: Tensor  # [B, S] int64; padding is pad_id, right of the tokens
    mask: Tensor  # [B, S] float32; 1.0 where the token is trained
    values: dict[str, Tensor]  # name -> [B, S] float32, zero on padding
    sample_indices: tuple[int, ...]  # index of each sample in the list that was split
    lengths: tuple[int, ...]  # tokens of each sample, in the order of sample_indices, with a shared prefix
    packed: bool = False
    groups: tuple[PackedGroup, ...] = ()  # packed: the row's samples in order, without padding

    @property
    def num_trained_tokens(self) -> int:
        return int(self.mask.sum().item())

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, without padding; a shared prefix counts once."""
        return sum(group.prefix + sum(group.own) for group in self.groups) if self.packed else sum(self.lengths)

    @property
    def segments(self) -> tuple[PackedGroup, ...]:
        """Packed: the groups that attention keeps apart, the padding at the end as one of them."""
        tail = self.ids.shape[1] - self.num_tokens
        return (*self.groups, PackedGroup(0, (tail,))) if tail else self.groups

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(row, columns) of each sample's own tokens, in the order of sample_indices, for padded and packed alike."""
        if not self.packed:
            yield from ((row, slice(0, length)) for row, length in enumerate(self.lengths))
            return
        start = 0
        for group in self.groups:
            start += group.prefix
            for length in group.own:
                yield 0, slice(start, start + length)
                start += length

    def numbered(self) -> Tensor:
        """[B, S] float32: each token's sample, as its place in sample_indices; 0 on padding and shared prefixes."""
        numbers = torch.zeros(self.ids.shape, dtype=torch.float32)
        for number, (row, columns) in enumerate(self.spans()):
            numbers[row, columns] = number
        return numbers

    def per_sample(self, values: Tensor) -> list[Tensor]:
        """values [B, S] -> a [T] tensor per sample, without padding, with a shared prefix in front."""
        found = []
        for length, (row, columns), prefix in zip(self.lengths, self.spans(), self._prefixes(), strict=True):
            own = values[row, columns]
            found.append(own if len(own) == length else torch.cat([values[row, prefix], own]))
        return found

    def _prefixes(self) -> Iterator[slice]:
        """Columns of each sample's shared prefix; empty if it shares none."""
        if not self.packed:
            yield from [slice(0, 0)] * len(self.lengths)
            return
        start = 0
        for group in self.groups:
            yield from [slice(start, start + group.prefix)] * len(group.own)
            start += group.prefix + sum(group.own)

    def to(self, device: torch.device) -> MicroBatch:
        return self._map(lambda tensor: on_device(tensor, device))

    def trained_rows(self) -> Tensor:
        """Where the mask is set, ascending, in the order of the model's output: [s, b] flattened. int64 [N]."""
        return self.mask.t().flatten().nonzero()[:, 0]

    def by_predicting_position(self) -> MicroBatch:
        """Every tensor shifted left by one: entry [b, t] now belongs to token t + 1, which position t predicts.

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


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A GPU reads it from pinned memory: from other memory, the copy waits for the GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def split_by_tokens(
    samples: Sequence[TokenSample],
    *,
    micro_batch_tokens: int,
    pad_id: int,
    pad_multiple: int = 1,
    packed: bool = False,
    share: bool = False,
    unit: int = 1,
) -> list[MicroBatch]:
    """Micro-batches of at most `micro_batch_tokens` tokens with padding (one unit alone may exceed it).

    Sorted by length. pad_multiple: row lengths are multiples of it (RankGrid.pad_multiple). share: packed rows, in
    which samples with equal prefixes are neighbors and share them. unit: consecutive samples that stay in one
    micro-batch (2: pairs); with `share` they must have equal prefixes. Raises ValueError for an empty list.
    """
    if not samples:
        raise ValueError("no samples to batch")
    units = units_of(len(samples), unit)
    if share:
        parts = _with_shared_prefixes(samples, units, micro_batch_tokens, pad_multiple)
        return [collate([samples[i] for i in part], tuple(part), pad_id, pad_multiple, True, True) for part in parts]
    batches: list[list[int]] = []
    rows: list[int] = []
    total = 0
    for members in _by_length(samples, units):  # ascending length: the newest row is the longest
        lengths = [len(samples[i].ids) for i in members]
        longest, count = (total + sum(lengths), 1) if packed else (max(lengths), len(rows) + len(members))
        size = _round_up(longest, pad_multiple) * count
        if rows and size > micro_batch_tokens:
            batches.append(rows)
            rows, total = [], 0
        rows += members
        total += sum(lengths)
    batches.append(rows)
    return [collate([samples[i] for i in rows], tuple(rows), pad_id, pad_multiple, packed) for rows in batches]


def units_of(count: int, unit: int) -> list[list[int]]:
    """The indices 0..count - 1 in consecutive units. Raises ValueError for a last unit that is not whole."""
    if count % unit:
        raise ValueError(f"{count} samples are not units of {unit}")
    return [list(range(first, first + unit)) for first in range(0, count, unit)]


def _by_length(samples: Sequence[TokenSample], units: Sequence[list[int]]) -> list[list[int]]:
    """The units by their longest sample, shortest first."""
    return sorted(units, key=lambda unit: (max(len(samples[i].ids) for i in unit), unit[0]))


def _with_shared_prefixes(
    samples: Sequence[TokenSample], units: Sequence[list[int]], micro_batch_tokens: int, pad_multiple: int
) -> list[list[int]]:
    """Indices of each row. A group that does not fit a row is split, each part with the prefix; small groups first."""
    room = micro_batch_tokens // pad_multiple * pad_multiple
    by_prefix: dict[tuple[int, ...], list[list[int]]] = {}
    for unit in units:
        by_prefix.setdefault(samples[unit[0]].prefix, []).append(unit)
    parts: list[tuple[int, list[int]]] = []  # (tokens, samples)
    for prefix, members in by_prefix.items():
        tokens, part = len(prefix), list[int]()
        for unit in _by_length(samples, members):
            own = sum(len(samples[i].ids) - len(prefix) for i in unit)
            if part and tokens + own > room:
                parts.append((tokens, part))
                tokens, part = len(prefix), []
            tokens, part = tokens + own, [*part, *unit]
        parts.append((tokens, part))
    rows: list[list[int]] = []
    total = 0
    for tokens, part in sorted(parts, key=lambda found: (found[0], found[1])):
        if not rows or total + tokens > room:
            rows.append([])
            total = 0
        rows[-1] += part
        total += tokens
    return rows


def collate(
    samples: Sequence[TokenSample],
    indices: tuple[int, ...],
    pad_id: int,
    pad_multiple: int,
    packed: bool,
    share: bool = False,
) -> MicroBatch:
    """All `samples` as one micro-batch. share (packed only): neighbors with equal prefixes share them.

    Raises ValueError if a sample trains a shared token or the token after the shared ones.
    """
    groups = tuple(_groups(samples, share)) if packed else ()
    lengths = tuple(len(sample.ids) for sample in samples)
    rows, longest = (len(samples), max(lengths))
    if packed:
        rows, longest = 1, sum(group.prefix + sum(group.own) for group in groups)
    shape = (rows, _round_up(longest, pad_multiple))
    batch = MicroBatch(
        ids=torch.full(shape, pad_id, dtype=torch.int64),
        mask=torch.zeros(shape, dtype=torch.float32),
        values={name: torch.zeros(shape, dtype=torch.float32) for name in samples[0].values},
        sample_indices=indices,
        lengths=lengths,
        packed=packed,
        groups=groups,
    )
    for sample, (row, columns), prefix in zip(samples, batch.spans(), batch._prefixes(), strict=True):
        shared = prefix.stop - prefix.start
        if shared and any(sample.mask[: shared + 1]):
            raise ValueError(f"a sample trains one of its first {shared + 1} tokens, which it shares with others")
        batch.ids[row, prefix] = torch.tensor(sample.ids[:shared], dtype=torch.int64)
        batch.ids[row, columns] = torch.tensor(sample.ids[shared:], dtype=torch.int64)
        batch.mask[row, columns] = torch.tensor(sample.mask[shared:], dtype=torch.float32)
        batch.mask[row, columns.start] = 0.0  # nothing comes before the first token
        for name, target in batch.values.items():
            target[row, columns] = torch.tensor(sample.values[name][shared:], dtype=torch.float32)
    return batch


def _groups(samples: Sequence[TokenSample], share: bool) -> Iterator[PackedGroup]:
    if not share:
        yield from (PackedGroup(0, (len(sample.ids),)) for sample in samples)
        return
    for prefix, members in itertools.groupby(samples, key=lambda sample: sample.prefix):
        own = tuple(len(sample.ids) - len(prefix) for sample in members)
        yield PackedGroup(len(prefix), own) if len(own) > 1 else PackedGroup(0, (len(prefix) + own[0],))


def of_one_length(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The batches, packed rows padded to the longest if that adds at most MOST_PADDING tokens per token."""
    lengths = [batch.ids.shape[1] for batch in batches]
    longest = max(lengths)
    if not all(batch.packed for batch in batches) or longest * len(lengths) > (1 + MOST_PADDING) * sum(lengths):
        return list(batches)
    return [batch._map(lambda tensor: _wider(tensor, longest)) for batch in batches]


def _wider(tensor: Tensor, length: int) -> Tensor:
    """[B, S] -> [B, length], zeros behind: they are masked, and id 0 is as good as any."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]))


def idle_like(batch: MicroBatch, pad_multiple: int) -> MicroBatch:
    """The smallest micro-batch, which trains nothing: for a rank that must take part in more passes than it has."""
    shape = (1, pad_multiple)
    values = {name: torch.zeros(shape, dtype=value.dtype) for name, value in batch.values.items()}
    ids = batch.ids[:1, :1].cpu().expand(shape).clone()
    return MicroBatch(ids, torch.zeros(shape), values, sample_indices=(), lengths=(), packed=batch.packed)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
