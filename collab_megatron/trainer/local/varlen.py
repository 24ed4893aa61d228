"""Attention over a packed row in one call: torch's flash attention, for GPUs without transformer-engine.

A call per sequence leaves most of a GPU idle for short sequences, and needs the lengths on the host. It is tried once
against scaled_dot_product_attention, and not used if it fails or differs. Written against torch 2.13
(torch/nn/attention/varlen.py), whose flash kernels take bf16 and fp16 only.
"""

from __future__ import annotations

import functools
import inspect
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

BOUND = 0.05  # of the trial: both sides round to bf16


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
def usable(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend` works here. Ranks need not agree."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
            logger.info(
                "packed rows: a call of attention for each sequence, because torch %s is old", torch.__version__
            )
            return False
        differs = _difference(device, dtype, head_dim)
    except Exception as error:  # noqa: BLE001  # whatever the kernels raise: training goes on without them
        reason = str(error).partition("\n")[0]
        logger.warning("packed rows: a call of attention for each sequence, because flash attention failed: %s", reason)
        return False
    if not differs < BOUND:
        logger.warning("packed rows: a call of attention for each sequence, because flash's differ by %g", differs)
        return False
    return True


def _difference(device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest difference of results and gradients, for two sequences of 5 and 3 tokens."""
    lengths = (5, 3)
    ends = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, head_dim) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, ends, max(lengths), scale=None, window=None)

    def apart(*qkv: Tensor) -> Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in qkv), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    found = []
    for function in (flash, apart):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            out = function(*inputs)
            gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        found.append(torch.cat([values.detach().float().flatten() for values in (out, *gradients)]))
    return (found[0] - found[1]).abs().max().item()
