"""Attention over a packed row in one call: torch's flash attention, for GPUs without transformer-engine.

A call per sequence leaves most of a GPU idle for short sequences, and needs the lengths on the host. It is tried once
against attention in fp32, and not used if it fails or differs. Written against torch 2.13
(torch/nn/attention/varlen.py), whose flash kernels take bf16 and fp16 only.
"""

from __future__ import annotations

import functools
import inspect
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from collab_megatron.trainer.local.trials import with_gradients

logger = logging.getLogger(__name__)

BOUND = 0.04
"""Of the trial. Rounding of probabilities, results and every head's gradients to bf16, replayed on a CPU for head sizes
of 64 to 256, comes to 0.017 at most; a scale that is a tenth off or a wrong mask to 0.09 at least."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, *, scale: float | None, window: int | None
) -> Tensor:
    """query [t, h, d], key and value [t, kv_h, d] of sequences end to end -> [t, h, d]; causal.

    ends: [sequences + 1] int32, where each begins, and the end. window: visible tokens, with the token itself.
    """
    from torch.nn.attention.varlen import varlen_attn  # here: missing in old versions

    out = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


@functools.cache
def usable(device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> bool:
    """Whether `attend` works here; windowed: with a window. Ranks need not agree."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
            logger.info(
                "packed rows: a call of attention for each sequence, because torch %s is old", torch.__version__
            )
            return False
        differs = difference(device, dtype, head_dim, windowed=windowed)
    except Exception as error:  # noqa: BLE001  # whatever the kernels raise: training goes on without them
        reason = str(error).partition("\n")[0]
        logger.warning("packed rows: a call of attention for each sequence, because flash attention failed: %s", reason)
        return False
    if not differs < BOUND:
        logger.warning("packed rows: a call of attention for each sequence, because flash's differ by %g", differs)
        return False
    return True


def difference(device: torch.device, dtype: torch.dtype, head_dim: int, *, windowed: bool) -> float:
    """How far `attend` is from attention in fp32 on the CPU: of the result and of each gradient the largest difference,
    over the largest value of that tensor; the largest of the four. For two sequences of 5 and 3 tokens."""
    lengths, window = (5, 3), 2 if windowed else None
    scale = 0.5 * head_dim**-0.5  # not the default
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn((sum(lengths), heads, head_dim), generator=generator).to(dtype) for heads in (4, 2, 2)]

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
        return attend(q, k, v, ends, max(lengths), scale=scale, window=window)

    def apart(*qkv: Tensor) -> Tensor:
        outs = []
        for q, k, v in zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in qkv), strict=True):
            distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
            seen = (distance >= 0) & (distance < (window or q.shape[2]))
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True))
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    ours = with_gradients(flash, [tensor.to(device) for tensor in tensors])
    exact = with_gradients(apart, [tensor.float() for tensor in tensors])
    parts = [(one - other).abs().max() / other.abs().max() for one, other in zip(ours, exact, strict=True)]
    return torch.stack(parts).max().item()  # nan, if one is
