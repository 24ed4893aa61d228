"""Attention of SGLang's CPU engine without its loop over sequences.

SGLang's `torch_native` backend handles one sequence after the other: with 32 sequences and 30 layers that is 960 small
calls per token, which take longer than the matrix products, each too small for a second thread. Here one call decodes
all sequences, padded to the longest, and a prefill computes only the queries of the new tokens. Other cases (encoders,
cross attention, sliding windows) go to SGLang's own code.

Legend: N sequences, L tokens of the longest, H heads, J key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# a batch in which padding would be more than this share of all keys is decoded in parts of similar length
MOST_PADDING = 0.5


Parts = list[tuple[Tensor | None, Tensor, Tensor]]
"""Of one forward pass: rows [n] (None: all), cache slots [n, L], mask of the keys that are seen [n, 1, 1, L]."""


class BatchedAttention(TorchNativeAttnBackend):
    """Replaces the two loops of SGLang's backend."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._parts: Parts | None = None  # those of this forward pass, all layers

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Tensor:
        """query and output [N, H, D]; k_cache and v_cache [slots, J, D]."""
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None:
            result: Tensor = super()._run_sdpa_forward_decode(
                *(query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens),
                *(scaling, enable_gqa, causal, is_cross_attn, sliding_window_size),
            )
            return result
        parts: Parts | None = getattr(self, "_parts", None)
        if parts is None:
            parts = self._parts = parts_of(req_to_token, req_pool_indices, seq_lens)
        for rows, slots, seen in parts:
            some = query if rows is None else query[rows]
            found = decode(some, k_cache, v_cache, slots, seen, scaling)
            if rows is None:
                output.copy_(found)
            else:
                output[rows] = found
        return output

    def _run_sdpa_forward_extend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Tensor:
        """query and output [new tokens of all sequences, H, D]."""
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None or not causal:
            result: Tensor = super()._run_sdpa_forward_extend(
                *(query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens),
                *(extend_prefix_lens, extend_seq_lens, encoder_lens),
                *(scaling, enable_gqa, causal, is_cross_attn, sliding_window_size),
            )
            return result
        lengths = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
        start = 0
        for row, length, new in lengths:
            slots = req_to_token[row, :length].long()
            rows = slice(start, start + new)
            output[rows] = extend(query[rows], k_cache[slots], v_cache[slots], scaling)
            start += new
        return output


def parts_of(req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor) -> Parts:
    """The batch as parts of similar length.

    The mask is True where a key is seen. Slots behind a sequence's end are 0, SGLang's own padding slot: finite.
    """
    lengths = seq_lens.tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cuts: list[list[int]] = []
    total = 0
    for row in reversed(order):  # the longest first: its part takes rows as long as they fill half of the square
        padded = lengths[cuts[-1][0]] * (len(cuts[-1]) + 1) if cuts else 0
        if not cuts or total + lengths[row] < (1.0 - MOST_PADDING) * padded:
            cuts.append([])
            total = 0
        cuts[-1].append(row)
        total += lengths[row]
    parts: Parts = []
    for part in cuts:
        rows = None if len(cuts) == 1 else torch.tensor(sorted(part), device=seq_lens.device)
        pools, ends = (req_pool_indices, seq_lens) if rows is None else (req_pool_indices[rows], seq_lens[rows])
        longest = lengths[part[0]]
        seen = torch.arange(longest, device=seq_lens.device)[None, :] < ends[:, None]
        slots = req_to_token[pools, :longest].long().masked_fill_(~seen, 0)
        parts.append((rows, slots, seen[:, None, None, :]))
    return parts


def decode(query: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """query [N, H, D], slots [N, L], seen [N, 1, 1, L] -> [N, H, D]; heads that share keys are rows of one query."""
    count, heads, size = query.shape
    shared = k_cache.shape[1]
    # index_select on flat slots is several times faster than fancy indexing on CPU
    keys, values = (
        cache.index_select(0, slots.reshape(-1))
        .view(*slots.shape, shared, cache.shape[2])
        .transpose(1, 2)
        .to(query.dtype)
        for cache in (k_cache, v_cache)
    )
    grouped = query.view(count, shared, heads // shared, size)
    found = scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=scale)
    return found.reshape(count, heads, found.shape[-1])


def extend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """The last tokens of one sequence: query [new, H, D], keys and values of all of it [L, J, D] -> [new, H, D]."""
    new, length = query.shape[0], keys.shape[0]
    q, k, v = (x.transpose(0, 1)[None].to(query.dtype) for x in (query, keys, values))
    grouped = q.shape[1] != k.shape[1]
    mask = None
    if new < length:  # is_causal would align the first query with the first key
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
    found = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return found[0].transpose(0, 1)


def install() -> None:
    """Replace the backend `torch_native` under its name."""

    @register_attention_backend("torch_native")
    def create(runner: Any) -> BatchedAttention:
        return BatchedAttention(runner)
