"""Sampling of SGLang's CPU engine with one random number a sequence instead of one for every token of the vocabulary.

SGLang draws an exponential for each token (the Gumbel trick): with 49,152 tokens and 32 sequences that is a seventh of
a decode step, on one thread. Here a uniform number is looked up in the cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sample(probs: Tensor) -> Tensor:
    """probs [N, V], each row with a positive sum -> token ids [N, 1]; a token without probability is never drawn."""
    totals = probs.cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device) * totals[:, -1:]
    # the first token whose total is above the number: its own share is not zero
    return torch.searchsorted(totals, drawn, right=True).clamp_(max=probs.shape[1] - 1)


def around_sampling(
    original: Callable[..., Tensor], probs: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Replaces SGLang's sampling_from_probs_torch unless a seed is given: ids [N] int32."""
    if sampling_seed is not None:
        return original(probs, sampling_seed=sampling_seed, positions=positions)
    return sample(probs).view(-1).to(torch.int32)


def install() -> None:
    """Hook SGLang's sampler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.layers.sampler.sampling_from_probs_torch", around_sampling, HookType.AROUND)
