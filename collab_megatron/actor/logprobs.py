"""Log-probability of the label and entropy, straight from vocabulary-sharded logits, in one pass.

Each rank reduces its own columns to four numbers per token; one all-gather of those gives the exact softmax statistics,
so no rank ever holds a whole row of logits. The logits are read, never written (upstream's cross entropy overwrites
them) and are taken to fp32 piece by piece, so bf16 logits cost no fp32 copy of themselves.

Legend: N tokens (sequence times batch, flattened), V columns of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # logits worked on at a time: 128 MiB of fp32


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        columns = logits.shape[1]
        local = labels - first
        mine = (local >= 0) & (local < columns)
        local = torch.where(mine, local, 0)
        # rows of `stats`: highest logit, sum of exp(logit - highest), the same weighted by the logit, the label's logit
        stats = torch.empty(4, logits.shape[0], dtype=torch.float32, device=logits.device)
        for i in range(0, logits.shape[0], rows):
            part = logits[i : i + rows].float()
            highest = part.amax(dim=1)
            exponentials = (part - highest[:, None]).exp_()
            stats[0, i : i + rows] = highest
            stats[1, i : i + rows] = exponentials.sum(dim=1)
            stats[2, i : i + rows] = torch.linalg.vecdot(exponentials, part)
            stats[3, i : i + rows] = part.gather(1, local[i : i + rows, None])[:, 0]
        stats[3].masked_fill_(~mine, 0.0)
        if group is not None and dist.get_world_size(group) > 1:
            shards = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, stats, group=group)
            every = torch.stack(shards)  # [ranks, 4, N]
            highest = every[:, 0].amax(dim=0)
            rescale = (every[:, 0] - highest).exp_()
            total, weighted = (every[:, 1] * rescale).sum(0), (every[:, 2] * rescale).sum(0)
            label_logit = every[:, 3].sum(0)
        else:
            highest, total, weighted, label_logit = stats
        log_normalizer = total.log() + highest
        logprobs = label_logit - log_normalizer
        entropy = log_normalizer - weighted / total
        ctx.save_for_backward(logits, local, mine, log_normalizer)
        ctx.rows = rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local, mine, log_normalizer = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        hit = torch.where(mine, grad, 0.0)
        for i in range(0, logits.shape[0], ctx.rows):
            piece = slice(i, i + ctx.rows)
            part = (logits[piece].float() - log_normalizer[piece, None]).exp_().mul_(-grad[piece, None])
            part.scatter_add_(1, local[piece, None], hit[piece, None])
            grad_logits[piece] = part
        return grad_logits, None, None, None, None


def logprobs_and_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab: int,
    tp_rank: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Per token: log-probability of its label (differentiable) and entropy of its distribution (not).

    logits: [..., V], this rank's columns of the padded vocabulary, any float dtype; labels: [...] int64, global ids;
    vocab: true size of the vocabulary, so that padding columns take no probability. Returns two [...] fp32 tensors, the
    same on every rank of `group`. Collective over `group` in the forward pass only.
    """
    columns = logits.shape[-1]
    first = tp_rank * columns
    flat = logits.reshape(-1, columns)
    real = min(max(vocab - first, 0), columns)
    if real < columns:
        # a rank of nothing but padding keeps a column that weighs nothing: its backward pass must run like the others'
        flat = flat[:, :real] if real else flat[:, :1] * 0.0 - 1e30
    rows = max(1, chunk_elements // max(1, columns))
    logprobs, entropy = _LogprobsAndEntropy.apply(flat, labels.reshape(-1), first, group, rows)
    return logprobs.view(labels.shape), entropy.view(labels.shape)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, first: int, real: int, group: Any, columns: int
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[0]
        local = labels - first
        mine = (local >= 0) & (local < real)
        local = torch.where(mine, local, 0)
        label_logit = torch.linalg.vecdot(hidden, weight[local]).float().masked_fill_(~mine, 0.0)
        stats = [torch.stack([_LEAST.expand(tokens), *torch.zeros(2, tokens)]).to(hidden.device)]
        for i in range(0, real, columns):
            part = (hidden @ weight[i : min(i + columns, real)].t()).float()
            highest = part.amax(dim=1)
            exponentials = (part - highest[:, None]).exp_()
            stats.append(torch.stack([highest, exponentials.sum(dim=1), torch.linalg.vecdot(exponentials, part)]))
        merged = torch.cat([_merge(torch.stack(stats)), label_logit[None]])
        if group is not None and dist.get_world_size(group) > 1:
            shards = [torch.empty_like(merged) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, merged, group=group)
            every = torch.stack(shards)  # [ranks, 4, N]
            merged, label_logit = _merge(every[:, :3]), every[:, 3].sum(dim=0)
        highest, total, weighted = merged[:3]
        log_normalizer = total.log() + highest
        entropy = log_normalizer - weighted / total
        ctx.save_for_backward(hidden, weight, local, mine, log_normalizer)
        ctx.real, ctx.columns = real, columns
        ctx.mark_non_differentiable(entropy)
        return label_logit - log_normalizer, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, mine, log_normalizer = ctx.saved_tensors
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32)
        weight_grad = torch.zeros_like(weight)
        for i in range(0, ctx.real, ctx.columns):
            j = min(i + ctx.columns, ctx.real)
            part = (hidden @ weight[i:j].t()).float().sub_(log_normalizer[:, None]).exp_().mul_(-grad[:, None])
            here = mine & (local >= i) & (local < j)
            part.scatter_add_(1, torch.where(here, local - i, 0)[:, None], torch.where(here, grad, 0.0)[:, None])
            part = part.to(hidden.dtype)
            hidden_grad += part @ weight[i:j]
            weight_grad[i:j] = part.t() @ hidden
        return hidden_grad.to(hidden.dtype), weight_grad, None, None, None, None, None


_LEAST = torch.tensor(-1e30)  # "highest logit" of no columns at all


def _merge(stats: Tensor) -> Tensor:
    """[parts, 3, N] (highest logit, sum of exp(logit - highest), the same weighted by the logit) -> [3, N]."""
    highest = stats[:, 0].amax(dim=0)
    rescale = (stats[:, 0] - highest).exp_()
    return torch.stack([highest, (stats[:, 1] * rescale).sum(dim=0), (stats[:, 2] * rescale).sum(dim=0)])


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab: int,
    tp_rank: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Per token: log-probability of its label (differentiable) and entropy of its distribution (not); fp32 [N] each.

    hidden: [N, H], any float dtype, whole (gathered over sequence parallelism); weight: [V, H], this rank's rows of the
    padded output matrix; labels: [N] int64, global ids; vocab: true size of the vocabulary, so that padding takes no
    probability; chunk_bytes: fp32 logits held at a time. Collective over `group` in the forward pass only.

    The gradient that reaches `hidden` is this rank's part of the sum over the vocabulary: put megatron's
    copy_to_tensor_model_parallel_region (or gather_from_sequence_parallel_region) in front, which sums it over `group`.
    """
    first = tp_rank * weight.shape[0]
    real = min(max(vocab - first, 0), weight.shape[0])
    columns = max(1, chunk_bytes // (4 * max(1, hidden.shape[0])))
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, labels, first, real, group, columns)
    return logprobs, entropy
