"""The output head of logprobs.py for GPUs: a tile of logits is read once in the forward pass and once in the backward.

torch's own operations read and write a tile's fp32 logits about ten times. Here the logits stay in the matmul's dtype:
one kernel reduces a row to the log of its total, its entropy and the label's logit, in fp32 and in one pass; the other
overwrites the logits with their gradient, "label minus softmax" times the token's factor. It is rounded once, after
"probability - 1" was taken in fp32.

Written for Triton 3.7 and checked there: the numbers under its interpreter on a CPU (TRITON_INTERPRET=1), registers and
spills of the code for sm_90 by tools/compile_kernels.py. Legend: as in logprobs.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from collab_megatron.trainer.actor.head_parts import WeightGrad, merge

# columns that a program reads at a time, and its warps: 16 elements for each thread
ROW_BLOCK, ROW_WARPS = 4096, 8
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]  # Triton's types are not Python's
    logits, local, log_total, entropy, label_logit, first, columns, scale, BLOCK: tl.constexpr
):
    """One row of logits [N, columns] -> log of its total, entropy, and the label's logit if this tile has it.

    scale: 1 / temperature. The running sums are relative to the highest logit so far, and change their scale with it;
    relative to 0, the rounding of large logits would show in a small entropy.
    """
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * columns
    highest = -1.0e30
    total = 0.0
    weighted = 0.0  # sum of exp(x - highest) * (x - highest)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < columns
        x = tl.load(here + column, mask=there, other=0.0).to(tl.float32) * scale
        x = tl.where(there, x, -1.0e30)
        new = tl.maximum(highest, tl.max(x, axis=0))
        fall = highest - new
        shrink = tl.exp(fall)
        below = x - new
        share = tl.exp(below)
        weighted = (weighted + total * fall) * shrink + tl.sum(share * below, axis=0)
        total = total * shrink + tl.sum(share, axis=0)
        highest = new
    label = tl.load(local + row) - first
    inside = (label >= 0) & (label < columns)
    value = tl.load(here + label, mask=inside, other=0.0).to(tl.float32)
    tl.store(label_logit + row, value * scale, mask=inside)
    tl.store(log_total + row, highest + tl.log(total))
    tl.store(entropy + row, tl.log(total) - weighted / total)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits, local, log_normalizer, grad, first, columns, scale, BLOCK: tl.constexpr
):
    """Overwrite a part of a row of logits [N, columns] with the gradient of (grad * log-probability of the label)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    at = logits + row * columns + column
    x = tl.load(at, mask=there, other=0.0).to(tl.float32) * scale
    share = tl.exp(x - tl.load(log_normalizer + row))
    label = tl.load(local + row) - first
    value = (tl.where(column == label, 1.0, 0.0) - share) * (tl.load(grad + row) * scale)
    tl.store(at, value.to(logits.dtype.element_ty), mask=there)


class TritonHeadLogprobs(torch.autograd.Function):
    """The same contract as logprobs._HeadLogprobs, for fp32 and bf16."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        local: Tensor,
        real: int,
        columns: int,
        keep: bool,
        group: dist.ProcessGroup | None,
        is_embedding: bool,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """local: [N] labels, counted from this rank's first column. real: columns of this rank without padding."""
        tokens = hidden.shape[0]
        tiles = [(i, min(i + columns, real)) for i in range(0, real, columns)]
        work = None if keep else hidden.new_empty(tokens * min(columns, real))
        label_logit = hidden.new_zeros(tokens, dtype=torch.float32)
        log_totals, entropies = hidden.new_empty(2, len(tiles), tokens, dtype=torch.float32)
        kept = []
        for t, (i, j) in enumerate(tiles):
            logits = _logits(hidden, weight[i:j], work)
            if tokens:
                statistics_kernel[(tokens,)](
                    logits,
                    local,
                    log_totals[t],
                    entropies[t],
                    label_logit,
                    i,
                    j - i,
                    1.0 / temperature,
                    BLOCK=ROW_BLOCK,
                    num_warps=ROW_WARPS,
                )
            if keep:
                kept.append(logits)
        log_normalizer, entropy, label_logit = merge(log_totals, entropies, label_logit, group)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, local, log_normalizer)
            # neither inputs nor outputs, so no cycle; saved tensors could not be overwritten, as the backward pass does
            ctx.kept = kept
            ctx.weight = weight  # the parameter, not a saved copy: megatron's gradient buffer is an attribute of it
            ctx.tiles, ctx.is_embedding, ctx.temperature = tiles, is_embedding, temperature
        ctx.mark_non_differentiable(entropy)
        return label_logit - log_normalizer, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, local, log_normalizer = ctx.saved_tensors
        weight, kept = ctx.weight, ctx.kept
        ctx.kept = []  # overwritten below: a second backward pass computes the logits again
        tokens, grad = hidden.shape[0], grad.contiguous()
        hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
        work = None if kept or not ctx.tiles else hidden.new_empty(tokens * ctx.tiles[0][1])
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32)
        weight_grad = WeightGrad(weight, ctx.is_embedding) if weight_wanted else None
        part = torch.empty_like(hidden)
        for t, (i, j) in enumerate(ctx.tiles):
            logits = kept[t] if kept else _logits(hidden, weight[i:j], work)
            if tokens:
                gradient_kernel[(tokens, triton.cdiv(j - i, GRADIENT_BLOCK))](
                    logits,
                    local,
                    log_normalizer,
                    grad,
                    i,
                    j - i,
                    1.0 / ctx.temperature,
                    BLOCK=GRADIENT_BLOCK,
                    num_warps=GRADIENT_WARPS,
                )
            if weight_grad is not None:
                weight_grad.write(i, j, logits, hidden)
            if hidden_wanted:
                hidden_grad.add_(torch.mm(logits, weight[i:j], out=part))
        found = None if weight_grad is None else weight_grad.finish(ctx.tiles[-1][1] if ctx.tiles else 0)
        return hidden_grad.to(hidden.dtype) if hidden_wanted else None, found, *[None] * 7


def _logits(hidden: Tensor, weight: Tensor, work: Tensor | None) -> Tensor:
    """hidden [N, H], weight [C, H] -> [N, C], at the start of `work` if given, and contiguous in any case."""
    if work is None:
        return hidden @ weight.t()
    tokens, columns = hidden.shape[0], weight.shape[0]
    return torch.mm(hidden, weight.t(), out=work[: tokens * columns].view(tokens, columns))
