"""What both output heads share (logprobs.py, triton_head.py): merge of tiles and ranks, target of the weight gradient.

Legend: as in logprobs.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collab_megatron.trainer.local.kernels import into_rows

NO_COLUMNS = -1e30  # log-normalizer of a rank with padding only: its weight is 0, without NaN


def merge(
    log_totals: Tensor, entropies: Tensor, label_logit: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's tiles, [T, N] each -> log-normalizer, entropy and label's logit [N] of the whole vocabulary.

    One all-gather over `group`; the results are equal on all its ranks. label_logit: 0 on ranks without the label.
    """
    log_normalizer, entropy = _union(log_totals, entropies)
    if group is None or dist.get_world_size(group) == 1 or not label_logit.numel():
        return log_normalizer, entropy, label_logit
    mine = torch.stack([log_normalizer, entropy, label_logit])
    shards = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, mine, group=group)
    every = torch.stack(shards, dim=1)  # [3, ranks, N]
    return *_union(every[0], every[1]), every[2].sum(dim=0)


def _union(log_totals: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    """[parts, N] logs of the totals and entropies of parts of the vocabulary -> those of their union, [N] each."""
    if not len(log_totals):
        return torch.full_like(log_totals.sum(dim=0), NO_COLUMNS), entropies.sum(dim=0)
    whole = log_totals.logsumexp(dim=0)
    log_shares = log_totals - whole
    return whole, (log_shares.exp() * (entropies - log_shares)).sum(dim=0)  # entropy's chain rule


class WeightGrad:
    """Target of the weight gradient's rows: megatron's buffer if the weight has one, else a new tensor.

    The protocol of the buffer is that of kernels._into_buffer, unless the weight is the embedding too: then autograd
    gets no gradient from here, and megatron's hook adds the embedding's gradient to the buffer.
    """

    def __init__(self, weight: Any, is_embedding: bool) -> None:
        self._weight, self._is_embedding = weight, is_embedding
        self._buffer: Tensor | None = getattr(weight, "main_grad", None)
        self._adds = self._buffer is not None and (is_embedding or weight.grad_added_to_main_grad)
        self._rows: Tensor = torch.empty_like(weight) if self._buffer is None else self._buffer

    def write(self, i: int, j: int, softmax: Tensor, scaled: Tensor) -> None:
        """Write rows i..j: softmax [N, j - i] transposed, times scaled [N, H]."""
        into_rows(self._rows[i:j], softmax.t(), scaled, adds=self._adds)

    def finish(self, written: int) -> Tensor | None:
        """The gradient for autograd. Rows from `written` on are padding."""
        if self._buffer is None:
            self._rows[written:] = 0.0
            return self._rows
        if self._is_embedding:
            return None
        if not self._adds:
            self._rows[written:] = 0.0
        self._weight.grad_added_to_main_grad = True
        return torch.empty_like(self._weight)
