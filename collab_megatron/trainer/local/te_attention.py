"""Whether transformer-engine has a fast attention for this model: flash or fused. Else it takes an unfused one.

The unfused one writes every score to memory. On an H200 a step of Qwen2.5-1.5B took four times as long with it as with
local/layers.py, although the rest was transformer-engine's (docs/benchmarks.md). What decides is known only there: the
versions of cuDNN and flash-attn, head sizes, window. So it is asked once, with a packed row.
"""

from __future__ import annotations

import functools
import importlib
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LENGTHS = (1500, 548)  # of the sequences of the trial


@functools.cache
def is_fast(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], window: int | None) -> bool:
    """heads: number of query heads, of key heads, and their size, on this rank. window: as in SdpaAttention.

    Ranks need not agree: both attentions compute the same. Written against transformer-engine 2.20.2
    (pytorch/attention/dot_product_attention).
    """
    if device.type == "meta":  # a model of shapes only
        return True
    try:
        chosen = _chosen(device, dtype, heads, window)
    except Exception as error:  # noqa: BLE001  # whatever its libraries raise: there is another attention
        reason = f"it failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    else:
        if chosen:
            return True
        reason = "it has no flash or fused one for this model here (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints why)"
    logger.warning("attention is torch's, not transformer-engine's: %s", reason)
    return False


def _chosen(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], window: int | None) -> bool:
    """Whether a forward and backward pass over a packed row takes a fast one."""
    attention = importlib.import_module("transformer_engine.pytorch.attention")
    num_heads, kv_heads, size = heads
    core = attention.DotProductAttention(
        num_heads,
        size,
        num_gqa_groups=kv_heads,
        attn_mask_type="padding_causal",
        qkv_format="thd",
        window_size=None if window is None else (window - 1, 0),
    )

    def random(count: int) -> Tensor:
        return torch.randn(sum(LENGTHS), count, size, device=device, dtype=dtype, requires_grad=True)

    ends = torch.tensor((0, LENGTHS[0], sum(LENGTHS)), device=device, dtype=torch.int32)
    with torch.enable_grad():
        out = core(
            random(num_heads),
            random(kv_heads),
            random(kv_heads),
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(LENGTHS),
            max_seqlen_kv=max(LENGTHS),
        )
        out.float().sum().backward()
    found = attention.dot_product_attention._attention_backends  # it has no public name for what it chose
    return bool(found["use_flash_attention"] or found["use_fused_attention"])
