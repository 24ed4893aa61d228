"""Norm, rotary embedding, gated activation, linear layer and short bf16 attention with hand-written backward passes.

Autograd derives the same gradients operation by operation: each writes a whole tensor that the next one reads. On a CPU
this memory traffic is most of the time besides the matrix products. Plain torch on any device, but on a GPU compiled.py
comes first; gradients are tested against autograd's. Legend: s sequence, b batch, h heads, g key/value heads, d head
size, n any leading dimensions.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collab_megatron.trainer.local.compiled import compiled

logger = logging.getLogger(__name__)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale in x's dtype, for a scale per row that is at least fp32; in bf16 rounded once, like any product.

    A scale rounded to bf16 would give the whole row the same error; the remainder of the rounding is added to avoid it.
    """
    if x.dtype == scale.dtype:
        return x * scale
    coarse = scale.to(x.dtype)
    return (x * (scale - coarse).to(x.dtype)).addcmul_(x, coarse)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype))
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = _scaled(x, scale)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        weight_grad = product.flatten(0, -2).sum(dim=0)
        along = torch.mv(product.flatten(0, -2), weight).view(scale.shape).div_(-normed.shape[-1])
        return _scaled((grad * weight).addcmul_(normed, along), scale), weight_grad, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [n, hidden], weight [hidden] -> x / rms(x) * weight, same shape and dtype."""
    if x.is_cuda and (fast := compiled("rms_norm", x.device)):
        return fast(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return out


def swiglu(x: Tensor) -> Tensor:
    """x [n, 2*ffn], gate before up -> silu(gate) * up [n, ffn]."""
    if x.is_cuda and (fast := compiled("swiglu", x.device)):
        return fast(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
    out: Tensor = _SwiGlu.apply(x)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """[s, b, h, d] by [s, 1, 1, d/2]; in memory the result is [b, h, s, d], as attention needs it."""
    length, batch, heads, size = x.shape
    out = torch.empty(batch, heads, length, size, dtype=x.dtype, device=x.device).permute(2, 0, 1, 3)
    (first, second), (to_first, to_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first)
    to_first.addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=to_second)
    to_second.addcmul_(first, sin, value=direction)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [s, b, h, d] rotated by angles whose cosines and sines are [s, 1, 1, d/2], in x's dtype."""
    if x.is_cuda and (fast := compiled("rope", x.device)):
        return fast(x, cos, sin)
    out: Tensor = _Rope.apply(x, cos, sin)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # the parameter itself, not a saved copy: megatron's gradient buffer is an attribute of it
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        x_grad = grad.matmul(weight) if ctx.needs_input_grad[0] else None
        bias_grad = rows.sum(dim=0) if ctx.has_bias else None
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = _into_buffer(weight, rows, inputs) if hasattr(weight, "main_grad") else rows.t() @ inputs
        return x_grad, weight_grad, bias_grad


def _into_buffer(weight: Any, rows: Tensor, inputs: Tensor) -> Tensor:
    """Add the weight's gradient to megatron's buffer; returns an empty placeholder, so that autograd runs its hook.

    The protocol is that of megatron's fused kernel: `grad_added_to_main_grad`, reset with the buffer, makes its hook
    ignore the placeholder. Here it also shows whether this is the buffer's first gradient, which needs no addition.
    """
    into_rows(weight.main_grad, rows.t(), inputs, adds=weight.grad_added_to_main_grad)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


@functools.cache
def adds_into_fp32(device: torch.device) -> bool:
    """Whether torch's addmm adds a product of bf16 matrices to an fp32 one on this device; tried once.

    torch 2.8 has out_dtype on CUDA (aten/src/ATen/native/cuda/Blas.cpp, _addmm_dtype_out_cuda), but refuses an fp32
    matrix to add to; later versions take it. No version has it on a CPU.
    """
    rows = torch.ones(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(rows, ones, ones, out_dtype=torch.float32, out=rows)
    except (RuntimeError, TypeError) as error:
        logger.debug("weight gradients are added to their buffer after the matrix product: %s", error)
        return False
    return bool((rows == 17).all())


def into_rows(rows: Tensor, left: Tensor, right: Tensor, *, adds: bool) -> None:
    """rows = left @ right, or rows += left @ right, where rows may be wider than the factors: an fp32 buffer of bf16.

    Where torch can, the matrix product adds to the wide buffer itself, as apex's wgrad_gemm_accum_fp32 does: it is
    never rounded to bf16, and nothing else reads or writes the buffer.
    """
    if rows.dtype == left.dtype:
        rows.addmm_(left, right, beta=1.0 if adds else 0.0)
    elif rows.dtype == torch.float32 and adds_into_fp32(rows.device):
        torch.addmm(rows, left, right, out_dtype=rows.dtype, beta=1.0 if adds else 0.0, out=rows)
    elif adds:
        rows.add_(left @ right)
    else:
        rows.copy_(left @ right)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, in], weight [out, in], bias [out] -> [n, out]; the weight's gradient goes into its `main_grad`, if any."""
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        # in fp32: scores rounded to bf16 have a relative error of up to 1/256, which the exponential magnifies
        wide = _wide(q.dtype)
        scores = torch.matmul(q.to(wide) * scale, k.to(wide).transpose(-1, -2))
        scores.view(*q.shape[:2], -1, *hidden.shape).add_(hidden)
        weights = torch.softmax(scores, dim=-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        v_grad = weights.transpose(-1, -2) @ grad
        scores_grad = torch._softmax_backward_data(grad @ v.transpose(-1, -2), weights, -1, weights.dtype)
        q_grad = (scores_grad @ k).mul_(ctx.scale)
        k_grad = (scores_grad.transpose(-1, -2) @ q).mul_(ctx.scale)
        return q_grad, k_grad, v_grad, None, None


def short_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention with the whole score matrix: q [b, h, s, d], k and v [b, g, p + s, d] -> [b, h, s, d]; the first
    p keys come before all queries.

    Scores and softmax are fp32, as in torch's CPU kernel, but the matrix products of the backward pass are large enough
    for the CPU's bf16 units: two to three times faster up to some hundred tokens. Longer matrices do not fit the cache.
    """
    batch, heads, length, size = q.shape
    groups = k.shape[1]
    keys = k.shape[2]
    hidden = torch.full((length, keys), -math.inf, dtype=_wide(q.dtype), device=q.device).triu_(1 + keys - length)
    rows = q.reshape(batch, groups, heads // groups * length, size)  # the queries that share a key are one matrix
    out: Tensor = _ShortAttention.apply(rows, k, v, hidden, size**-0.5 if scale is None else scale)
    return out.view(batch, heads, length, size)
