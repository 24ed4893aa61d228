"""Proof that a server holds exactly the trainer's weights: checksums of its tensors, computed from what was sent.

SGLang's /weights_checker (srt/utils/weight_checker.py) hashes every tensor as it lies in the server's memory. The
sender hashes the same bytes while it sends them, tensor by tensor, and keeps no copy; engine_layout.py has their order.
A full check at every sync would cost a pass over all weights on both sides, so between full checks only a rotating part
of the model is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from collab_megatron.errors import RunError, WeightsDiffer
from collab_megatron.model.spec import ModelSpec
from collab_megatron.trainer.sync.proof.engine_layout import (
    Device,
    EngineTensor,
    Source,
    engine_tensors,
    hf_names,
    unit_count,
)

CHUNK_BYTES = 8 << 20  # hashed at a time: column cuts are copied, and the word hash needs five times this

# sglang/kernels/ops/memory/gpu_tensor_hash.py: constants, and gpu_tensor_hash's default arguments
TILE_WORDS = 8192
SEED = 0x243F6A88
FMIX32 = (0x85EBCA6B, 0xC2B2AE35)
LANES = (  # multiplier of the position, seed, rotation of the position
    (0x27D4EB2D, SEED, 15),
    (0x165667B1, (SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF, 13),
)


def units_of_sync(spec: ModelSpec, sync_number: int, verify_every: int) -> frozenset[int]:
    """The units (engine_layout.unit_count) that a sync checks: all at sync 0 and at every `verify_every`-th, else every
    `verify_every`-th unit, rotating, so that each is checked at least once in `verify_every` syncs. 0: none, ever."""
    if verify_every == 0:
        return frozenset()
    phase = sync_number % verify_every
    return frozenset(unit for unit in range(unit_count(spec)) if phase == 0 or unit % verify_every == phase)


def skip_patterns(spec: ModelSpec, units: frozenset[int]) -> list[str]:
    """SGLang's `skip_tensor_list` for a check of `units`: it skips every name that contains one of these."""
    patterns: list[str] = []
    for unit in range(unit_count(spec)):
        if unit in units:
            continue
        if unit == 0:
            patterns.append("model.embed_tokens.")
        elif unit <= spec.layers:
            patterns.append(f"model.layers.{unit - 1}.")  # the dot at its end: 1 is not 11
        else:
            patterns += ["model.norm.", "lm_head."]
    return patterns


class ExpectedChecksums:
    """The checksums that a server of `ranks` tensor-parallel ranks must report for `units`, computed during the send.

    `device` is the server's: on "cpu" SGLang uses sha256, on "cuda" a hash of words and positions, which is computed
    where the tensors are.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        ranks: int,
        units: frozenset[int],
        *,
        device: Device,
    ) -> None:
        self._dtype, self._ranks = dtype, ranks
        growing = (
            _TensorHash(tensor, ranks, device, dtype.itemsize)
            for unit in sorted(units)
            for tensor in engine_tensors(spec, unit, ranks=ranks, device=device)
        )
        self._open = {source.hf: one for one in growing for source in one.layout.sources}  # by Hugging Face name

    def wants(self, names: Iterable[str]) -> bool:
        """Whether any of these Hugging Face tensors belongs to a unit that is checked; if not, none need be made."""
        return any(name in self._open for name in names)

    def add(self, name: str, tensor: Tensor) -> None:
        """Hash one Hugging Face tensor: whole, contiguous, of `dtype`, in the order of `tensor_plan`. Tensors that are
        not checked cost nothing. The tensor may be overwritten afterwards (on CUDA: by work on the same stream)."""
        growing = self._open.get(name)
        if growing is not None:
            assert tensor.dtype == self._dtype, f"{name} is {tensor.dtype}, planned {self._dtype}"
            growing.add(name, tensor.detach())

    def result(self) -> dict[str, list[str]]:
        """The server's tensor name -> 16 hex digits per rank, for all that was added. Call it once, at the end."""
        begun = [growing for growing in dict.fromkeys(self._open.values()) if growing.position]
        for growing in begun:
            assert growing.complete, f"only a part of {growing.layout.name} was added"
        sums = [digest for growing in begun for digest in growing.digests if isinstance(digest, Tensor)]
        words = iter(torch.stack(sums).tolist() if sums else [])  # waits for a GPU once, not for each tensor
        result = {}
        for growing in begun:
            digests = [digest if isinstance(digest, str) else _hex(next(words)) for digest in growing.digests]
            result[growing.layout.name] = digests if len(digests) == self._ranks else digests * self._ranks
        return result


def merge(results: Iterable[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Join the results of several senders, each of its own layers. Raises RunError if two disagree on a tensor."""
    merged: dict[str, list[str]] = {}
    for number, result in enumerate(results):
        for name, digests in result.items():
            if merged.setdefault(name, list(digests)) != list(digests):
                raise RunError(
                    f"trainer ranks differ: sender {number} has other values of {name} than a sender before it"
                )
    return merged


def compare(expected: Mapping[str, Sequence[str]], actual_per_rank: Sequence[Mapping[str, str]], server: str) -> None:
    """Raise WeightsDiffer unless every rank of the server holds exactly the tensors of `expected` with equal values.

    `actual_per_rank`: EngineControl.checksums with the skip_patterns of the same units. The error names server, rank,
    tensor and the Hugging Face tensors in it.
    """
    ranks = {len(digests) for digests in expected.values()}
    if ranks and ranks != {len(actual_per_rank)}:
        planned = ", ".join(map(str, ranks))
        raise WeightsDiffer(f"{server} answered for {len(actual_per_rank)} tensor-parallel ranks, not {planned}")
    first, wrong = "", set()
    for rank, actual in enumerate(actual_per_rank):
        for name in dict.fromkeys((*expected, *actual)):
            if name not in actual:
                what = "is missing"
            elif name not in expected:
                what = "is unexpected"
            elif actual[name] != expected[name][rank]:
                what = f"has checksum {actual[name]}, not {expected[name][rank]}"
            else:
                continue
            first = first or f"on tensor-parallel rank {rank} {name} ({', '.join(hf_names(name))}) {what}"
            wrong.add(name)
    if wrong:
        total = len({name for actual in actual_per_rank for name in actual}.union(expected))
        raise WeightsDiffer(
            f"{server} does not hold the trainer's weights: {first}; {len(wrong)} of {total} tensors differ"
        )


class _Sha256:
    """SGLang's hash of a tensor on CPU (srt/managers/mm_utils.py, tensor_hash): 8 bytes of sha256."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: Tensor) -> None:
        """The next bytes: uint8 [n], contiguous."""
        self._hash.update(data.cpu().numpy().data)

    def digest(self) -> str:
        return self._hash.digest()[:8].hex()


class _WordHash:
    """SGLang's hash of a tensor on a GPU (sglang/kernels/ops/memory/gpu_tensor_hash.py), in plain torch.

    Every 32-bit word is mixed with its position; the results are summed per tile of TILE_WORDS, and the tiles are mixed
    and summed again. Sums do not depend on the order, so chunks of any size give the same hash. int32 stands in for
    uint32: sums and products wrap alike, and right shifts are masked.
    """

    def __init__(self, num_bytes: int) -> None:
        self._words = -(-num_bytes // 4)
        assert self._words < 2**31, "the kernel counts words in int32"
        self._at = 0  # words hashed
        self._rest: Tensor | None = None  # bytes that do not fill a word yet
        self._sums: Tensor | None = None  # int64 [2, tiles]

    def update(self, data: Tensor) -> None:
        """The next bytes: uint8 [n], contiguous, on any device."""
        if self._rest is not None:
            data = torch.cat([self._rest, data])
        whole = data.numel() // 4 * 4
        self._rest = data[whole:].clone() if whole < data.numel() else None
        data = data[:whole]
        if data.storage_offset() % 4:
            data = data.clone()
        self._add(data.view(torch.int32))

    def _add(self, words: Tensor) -> None:
        if self._sums is None:
            self._sums = torch.zeros(2, -(-self._words // TILE_WORDS), dtype=torch.int64, device=words.device)
        end = self._at + words.numel()
        before, after = self._at % TILE_WORDS, -end % TILE_WORDS
        tiles = slice(self._at // TILE_WORDS, -(-end // TILE_WORDS))
        position = torch.arange(self._at, end, dtype=torch.int32, device=words.device)
        for sums, (factor, seed, rotation) in zip(self._sums, LANES, strict=True):
            mixed = (position << rotation).bitwise_or_(position >> (32 - rotation))  # never negative: no mask
            mixed ^= (position * _int32(factor)).add_(_int32(seed))
            mixed ^= words
            _fmix32_(mixed)
            if before or after:
                mixed = torch.nn.functional.pad(mixed, (before, after))
            sums[tiles] += mixed.view(-1, TILE_WORDS).sum(1, dtype=torch.int64)
        self._at = end

    def digest(self) -> Tensor:
        """After all bytes: int64 [] that `_hex` turns into the hash, on the data's device, without waiting for it."""
        if self._rest is not None:
            self.update(torch.zeros(4 - self._rest.numel(), dtype=torch.uint8, device=self._rest.device))
        assert self._at == self._words, f"{self._at} words of {self._words} were added"
        if self._sums is None:
            return torch.zeros((), dtype=torch.int64)
        # from here on the 32-bit values are int64, so that the two lanes can be joined
        high, low = _fmix32_((self._sums & 0xFFFFFFFF) ^ (self._words * 4 & 0xFFFFFFFF))
        return ((high << 32) | low).sum()


def _fmix32_(x: Tensor) -> Tensor:
    """Murmur3's finalizer, in place, over the low 32 bits of int32 or int64."""
    wide = x.dtype == torch.int64
    for shift, factor in ((16, FMIX32[0]), (13, FMIX32[1]), (16, None)):
        x ^= (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        if factor is not None:
            x *= factor if wide else _int32(factor)
            if wide:
                x &= 0xFFFFFFFF
    return x


def _int32(word: int) -> int:
    """The int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _hex(total: int) -> str:
    """The kernel's final mix (_final_splitmix64) of its sum over tiles."""
    mask = (1 << 64) - 1
    x = total & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return f"{x ^ (x >> 31):016x}"


class _TensorHash:
    """One engine tensor with a hash for every rank, or one for all ranks where they hold the same."""

    def __init__(self, layout: EngineTensor, ranks: int, device: Device, itemsize: int) -> None:
        self.layout = layout
        self.position = 0  # number of sources that were added
        self.digests: list[str | Tensor] = []  # once complete
        self._hashes: list[_Sha256 | _WordHash] = [
            _Sha256() if device == "cpu" else _WordHash(layout.elements * itemsize)
            for _ in range(1 if layout.same_on_all_ranks else ranks)
        ]

    @property
    def complete(self) -> bool:
        return self.position == len(self.layout.sources)

    def add(self, name: str, tensor: Tensor) -> None:
        assert not self.complete, f"{name} was added twice"
        source = self.layout.sources[self.position]
        assert source.hf == name, f"{name} was added where {source.hf} is next in {self.layout.name}"
        assert tuple(tensor.shape) == source.shape, f"{name} has shape {tuple(tensor.shape)}, not {source.shape}"
        for rank, hash_ in enumerate(self._hashes):
            for chunk in _chunks(source, rank, tensor):
                hash_.update(chunk)
        self.position += 1
        if self.position == len(self.layout.sources):
            self.digests = [hash_.digest() for hash_ in self._hashes]
            self._hashes.clear()  # word hashes keep sums per tile, which add up over a large model


def _chunks(source: Source, rank: int, tensor: Tensor) -> Iterator[Tensor]:
    """The rank's part of a tensor with its padding, in byte order, as uint8 [n] with n up to about CHUNK_BYTES."""
    if source.cut is None or source.cut == 0:
        start, stop = (0, tensor.shape[0]) if source.cut is None else source.part(rank)
        part = tensor[start:stop].reshape(-1).view(torch.uint8)
        yield from part.split(CHUNK_BYTES)
        padding = source.elements * tensor.itemsize - part.numel()
        if padding:
            yield from torch.zeros(padding, dtype=torch.uint8, device=tensor.device).split(CHUNK_BYTES)
        return
    start, stop = source.part(rank)
    padding = source.split.width - (stop - start)
    rows = max(1, CHUNK_BYTES // (source.split.width * tensor.itemsize))
    for block in tensor[:, start:stop].split(rows):
        if padding:
            block = torch.nn.functional.pad(block, (0, padding))
        yield block.contiguous().reshape(-1).view(torch.uint8)
