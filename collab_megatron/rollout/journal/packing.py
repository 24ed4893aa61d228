"""Policy turns and reply texts as bytes. Log-probs are restored bit for bit, texts character for character."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import groupby

import msgspec

from collab_megatron.types import Generation

IDS, LOGPROBS = "i", "d"
"""Array types in the machine's byte order, since the file stays on its node. A log-prob is a Python float, 8 bytes."""


class _Turn(msgspec.Struct, array_like=True):
    ids: bytes
    logprobs: bytes
    spans: list[tuple[int, int]]  # (weight version, number of consecutive tokens that it sampled)
    finish_reason: str
    cached_tokens: int


_encoder = msgspec.msgpack.Encoder()
_turns = msgspec.msgpack.Decoder(list[_Turn])
_texts = msgspec.msgpack.Decoder(list[bytes])


def pack_generations(generations: Sequence[Generation]) -> bytes:
    """About 12 bytes per token."""
    return _encoder.encode([_pack(generation) for generation in generations])


def unpack_generations(content: bytes) -> tuple[Generation, ...]:
    """Raises ValueError for bytes that `pack_generations` did not make."""
    return tuple(_unpack(turn) for turn in _turns.decode(content))


def pack_texts(texts: Sequence[str]) -> bytes:
    """As UTF-8; halves of surrogate pairs, which a model's JSON may contain, are kept."""
    return _encoder.encode([text.encode("utf-8", "surrogatepass") for text in texts])


def unpack_texts(content: bytes) -> tuple[str, ...]:
    """Raises ValueError for bytes that `pack_texts` did not make."""
    return tuple(text.decode("utf-8", "surrogatepass") for text in _texts.decode(content))


def _pack(generation: Generation) -> _Turn:
    return _Turn(
        ids=array(IDS, generation.token_ids_T).tobytes(),
        logprobs=array(LOGPROBS, generation.logprobs_T).tobytes(),
        spans=[(version, len(list(run))) for version, run in groupby(generation.versions_T)],
        finish_reason=generation.finish_reason,
        cached_tokens=generation.cached_tokens,
    )


def _unpack(turn: _Turn) -> Generation:
    versions: list[int] = []
    for version, length in turn.spans:
        versions += [version] * length
    return Generation(
        token_ids_T=tuple(array(IDS, turn.ids)),
        logprobs_T=tuple(array(LOGPROBS, turn.logprobs)),
        versions_T=tuple(versions),
        finish_reason=turn.finish_reason,
        cached_tokens=turn.cached_tokens,
    )
