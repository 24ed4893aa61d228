"""Log-probability of the label and entropy from hidden states, without the logits of all tokens at once.

The vocabulary is processed in tiles. A tile's softmax is reduced to two numbers per token (the log of its total, its
entropy); those of all tiles, then of all ranks, are merged exactly. Tiles of columns, not of tokens, mean that one
matmul writes each row of the weight's gradient, without accumulation.

On a GPU, triton_head.py does the same with fewer passes over memory; this file is the reference, and what a CPU uses.

The backward pass needs every tile's softmax again. They are kept from the forward pass if all fit the caller's budget
(three matmuls per step, as in a plain head), else recomputed (four). The kept softmax is that of the tile alone, so it
is not touched again: the rest of the gradient's factor belongs to the token and goes to the small side of each matmul.
Only the label's entry is overwritten, in fp32 and before any rounding, which would lose "probability - 1" of a token
that is almost certain.

Legend: N tokens (sequence times batch, flattened), H hidden size, V rows of the output matrix on this rank, C columns
of a tile, T tiles.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from collab_megatron.model.memory import tile_columns
from collab_megatron.trainer.actor.head_parts import WeightGrad, merge

logger = logging.getLogger(__name__)

# the largest difference in the trial of Triton's head: fp32 or TF32 products, of logits with a spread of 16
TRIAL_BOUND = 0.05
# a tile with less than 1 / MOST_RARE of the probability counts as if it had that much, so that its factors are finite
MOST_RARE = 1e15


class _Workspace:
    """Memory for one tile, used for each in turn."""

    def __init__(self, hidden: Tensor, columns: int, temperature: float) -> None:
        self.temperature = temperature
        size = hidden.shape[0] * columns
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.product = torch.empty(size, dtype=hidden.dtype, device=hidden.device)
        self.rounded = hidden.dtype != wide
        self.logits = torch.empty(size, dtype=wide, device=hidden.device) if self.rounded else self.product
        self.softmax = torch.empty(size, dtype=wide, device=hidden.device)

    def fill(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, H], weight [C, H] -> logits / temperature, and their softmax over the tile, fp32 [N, C].

        Valid until the next call."""
        shape = hidden.shape[0], weight.shape[0]
        product, logits, softmax = (_view(flat, shape) for flat in (self.product, self.logits, self.softmax))
        torch.mm(hidden, weight.t(), out=product)
        if self.rounded:
            logits.copy_(product)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        return logits, torch.softmax(logits, 1, out=softmax)

    def narrow(self, softmax: Tensor) -> Tensor:
        """The softmax of `fill` in the matmul's dtype; valid until the next call."""
        return _view(self.product, softmax.shape).copy_(softmax) if self.rounded else softmax


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    tiles: list[tuple[int, int]],
    work: _Workspace,
    keep: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """The forward pass: log of each tile's total [T, N]; log-normalizer, entropy and label's logit [N] of the whole
    vocabulary; with `keep` each tile's softmax [N, C]."""
    label_logit = work.softmax.new_zeros(hidden.shape[0])
    log_totals, entropies = work.softmax.new_empty(2, len(tiles), hidden.shape[0])
    kept = []
    for t, (i, j) in enumerate(tiles):
        logits, softmax = work.fill(hidden, weight[i:j])
        # the fused softmax does not return its total, but the highest logit's share is exp(highest - log total)
        highest, log_share = logits.amax(dim=1), softmax.amax(dim=1).log_()
        torch.sub(highest, log_share, out=log_totals[t])
        inside, column = _columns(local, i, j)
        label_logit = torch.where(inside, logits.gather(1, column[:, None])[:, 0], label_logit)
        # relative to the highest logit: the rounding of large logits would show in a small entropy
        mean = logits.sub_(highest[:, None]).mul_(softmax).sum(dim=1)
        torch.add(log_share, mean, out=entropies[t]).neg_()
        if keep:
            kept.append(softmax.to(hidden.dtype, copy=True))
    return log_totals, merge(log_totals, entropies, label_logit, group), kept


class _HeadLogprobs(torch.autograd.Function):
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
        tiles = [(i, min(i + columns, real)) for i in range(0, real, columns)]
        work = _Workspace(hidden, min(columns, real), temperature)
        log_totals, (log_normalizer, entropy, label_logit), kept = _statistics(
            hidden, weight, local, tiles, work, keep, group
        )
        logprobs = label_logit - log_normalizer
        rarity = (log_normalizer - log_totals).exp_().clamp_(max=MOST_RARE)  # 1 / (the tile's share of probability)
        label_share = (label_logit - log_totals).exp_()  # the label's share of the tile that has it
        for softmax, (i, j), rare, share in zip(kept, tiles, rarity, label_share, strict=keep):
            _subtract_label(softmax, local, i, j, share - rare)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, local, rarity, label_share, *kept)
            ctx.weight = weight  # the parameter, not a saved copy: megatron's gradient buffer is an attribute of it
            ctx.tiles, ctx.is_embedding, ctx.temperature = tiles, is_embedding, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, local, rarity, label_share, *kept = ctx.saved_tensors
        weight = ctx.weight
        hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
        work = None if kept or not ctx.tiles else _Workspace(hidden, ctx.tiles[0][1], ctx.temperature)
        hidden_grad = torch.zeros_like(hidden, dtype=rarity.dtype)
        weight_grad = WeightGrad(weight, ctx.is_embedding) if weight_wanted else None
        part = torch.empty_like(hidden)
        for t, (i, j) in enumerate(ctx.tiles):
            if work is None:
                softmax = kept[t]
            else:
                _, wide = work.fill(hidden, weight[i:j])
                _subtract_label(wide, local, i, j, label_share[t] - rarity[t])
                softmax = work.narrow(wide)
            factor = (-grad / (rarity[t] * ctx.temperature))[:, None]
            if weight_grad is not None:
                weight_grad.write(i, j, softmax, (hidden * factor).to(hidden.dtype))
            if hidden_wanted:
                hidden_grad.addcmul_(torch.mm(softmax, weight[i:j], out=part), factor)
        found = None if weight_grad is None else weight_grad.finish(ctx.tiles[-1][1] if ctx.tiles else 0)
        return hidden_grad.to(hidden.dtype) if hidden_wanted else None, found, *[None] * 7


class _HeadWithEntropy(torch.autograd.Function):
    """As _HeadLogprobs, and the entropy has a gradient too, for an entropy bonus. Every tile is computed again in the
    backward pass, in the dtype of the statistics:

    d(g * logprob + h * entropy) / d logit_j = g * (1 if j is the label else 0) - p_j * (g + h * (log p_j + entropy))
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        local: Tensor,
        real: int,
        columns: int,
        group: dist.ProcessGroup | None,
        is_embedding: bool,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Arguments as those of _HeadLogprobs."""
        tiles = [(i, min(i + columns, real)) for i in range(0, real, columns)]
        work = _Workspace(hidden, min(columns, real), temperature)
        _, (log_normalizer, entropy, label_logit), _ = _statistics(hidden, weight, local, tiles, work, False, group)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, local, log_normalizer, entropy)
            ctx.weight = weight  # the parameter, not a saved copy: megatron's gradient buffer is an attribute of it
            ctx.tiles, ctx.is_embedding, ctx.temperature = tiles, is_embedding, temperature
        return label_logit - log_normalizer, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, local, log_normalizer, entropy = ctx.saved_tensors
        weight = ctx.weight
        hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden, dtype=log_normalizer.dtype)
        weight_grad = WeightGrad(weight, ctx.is_embedding) if weight_wanted else None
        work = _Workspace(hidden, ctx.tiles[0][1], ctx.temperature) if ctx.tiles else None
        for i, j in ctx.tiles:
            assert work is not None
            log_shares = work.fill(hidden, weight[i:j])[0] - log_normalizer[:, None]
            slope = grad[:, None] + entropy_grad[:, None] * (log_shares + entropy[:, None])
            of_logits = -log_shares.exp() * slope
            inside, column = _columns(local, i, j)
            of_logits.scatter_add_(1, column[:, None], torch.where(inside, grad, 0.0)[:, None])
            of_logits = (of_logits / ctx.temperature).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad.write(i, j, of_logits, hidden)
            if hidden_wanted:
                hidden_grad.add_(torch.mm(of_logits, weight[i:j]))
        found = None if weight_grad is None else weight_grad.finish(ctx.tiles[-1][1] if ctx.tiles else 0)
        return hidden_grad.to(hidden.dtype) if hidden_wanted else None, found, *[None] * 6


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The start of a flat buffer as a contiguous matrix."""
    return flat[: shape[0] * shape[1]].view(shape)


def _columns(local: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """[N] labels -> whether each is in columns i..j, and its column in that tile (any column if it is not)."""
    return (local >= i) & (local < j), (local - i).clamp_(0, j - i - 1)


def _subtract_label(softmax: Tensor, local: Tensor, i: int, j: int, value: Tensor) -> None:
    """Overwrite the label's entry in a tile [N, C] with `value` [N], if the tile has it; no synchronization."""
    inside, column = _columns(local, i, j)
    here = column[:, None]
    softmax.scatter_(1, here, torch.where(inside[:, None], value[:, None].to(softmax.dtype), softmax.gather(1, here)))


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab: int,
    tp_rank: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int,
    is_embedding: bool = False,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per token: log-probability of its label and entropy of its distribution; fp32 [N] each. The entropy is
    differentiable with `entropy_gradient` only, which computes every softmax again in the backward pass.

    hidden: [N, H], any float dtype (statistics of float64 are float64), all tokens of this data rank, gathered over
    sequence parallelism. weight: [V, H], same dtype, this rank's rows of the padded output matrix. labels: [N] int64,
    global ids below `vocab`, the size of the vocabulary without padding, which has no probability. chunk_bytes: limit
    of this rank's fp32 logits; if those of all tokens fit, their softmax is kept until the backward pass, in `hidden`'s
    dtype, else recomputed there. is_embedding: the weight is the embedding of the same pass too. temperature: logits
    are divided by it first, in fp32, so both results are of the distribution that is sampled at that temperature. The
    weight's gradient goes into its `main_grad`, if any. Raises ValueError if shapes or dtypes do not fit.

    One all-gather of [3, N] fp32 over `group` in the forward pass; results are equal on all its ranks. The gradient of
    `hidden` is only this rank's part of the sum over the vocabulary: put megatron's
    copy_to_tensor_model_parallel_region (or gather_from_sequence_parallel_region) in front, which sums it over `group`.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype} must be "
            "[N, H] and [V, H] of one dtype"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be one for each of the {hidden.shape[0]} tokens")
    if hidden.dtype == torch.float16:  # its range is too small for a rare tile's factor and for the gradient
        hidden, weight = hidden.float(), weight.float()
    first = tp_rank * weight.shape[0]
    real = min(max(vocab - first, 0), weight.shape[0])
    column_bytes = 4 * max(1, hidden.shape[0])
    columns = tile_columns(hidden.shape[0], device=hidden.device.type, chunk_bytes=chunk_bytes)
    trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if trains and entropy_gradient:
        found: tuple[Tensor, Tensor] = _HeadWithEntropy.apply(
            hidden, weight, labels - first, real, columns, group, is_embedding, temperature
        )
        return found
    keep = trains and column_bytes * real <= chunk_bytes
    triton_head = _triton_head() if hidden.is_cuda and hidden.dtype in (torch.float32, torch.bfloat16) else None
    head = _HeadLogprobs if triton_head is None else triton_head
    logprobs, entropy = head.apply(
        hidden, weight, labels - first, real, columns, keep, group, is_embedding, temperature
    )
    return logprobs, entropy


@functools.cache
def _triton_head() -> type[torch.autograd.Function] | None:
    """The head of triton_head.py, tried once against the one in this file; None, with a warning, if it does not work.

    Both have the same collectives, so ranks need not agree.
    """
    try:
        from collab_megatron.trainer.actor.triton_head import TritonHeadLogprobs  # here: Triton may be missing

        differs = _difference(TritonHeadLogprobs, torch.device("cuda", torch.cuda.current_device()))
    except Exception as error:  # noqa: BLE001  # a missing package, or whatever compiler and driver raise: training goes on without it
        logger.warning("output head: torch's operations, because Triton's cannot be used (%r)", error)
        return None
    if not differs < TRIAL_BOUND:
        logger.warning("output head: torch's operations, because Triton's differ from them by %g", differs)
        return None
    logger.info("output head: Triton, which differs from torch's operations by %.1g", differs)
    return TritonHeadLogprobs


def _difference(other: type[torch.autograd.Function], device: torch.device) -> float:
    """The largest difference of the two heads' results and gradients for a few tokens."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 299, 7, 150, 128], device=device)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(device) for n in (len(labels), 300))
    found = []
    for head in (_HeadLogprobs, other):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.enable_grad():
            results = head.apply(*inputs, labels, len(weight), 128, False, None, False, 0.5)
            gradients = torch.autograd.grad(results[0].sum(), inputs)
        found.append(torch.cat([values.detach().flatten() for values in (*results, *gradients)]))
    return (found[0] - found[1]).abs().max().item()
