"""DPO: the sigmoid loss on pairs of replies, and the pairs as token samples. Pure.

The loss of a pair depends on sums over whole replies, so both replies of a pair are in one micro-batch: batches are
split in units of PAIR samples (batching.split_by_tokens). The number of micro-batches and of data ranks then changes
neither loss nor gradient: the caller divides the sum over pairs by the pairs of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from collab_megatron.trainer.batching.micro_batch import MicroBatch, TokenSample
from collab_megatron.trainer.loss.losses import LossSum
from collab_megatron.trainer.loss.policy_step import ENGINE_GAP

PAIR = 2
"""Samples of a pair: the chosen reply, then the rejected one."""
PREFERENCE = "preference"
"""Per-token value: +n on the trained tokens of the chosen reply of pair n (from 1), -n on those of the rejected one."""
PER_TOKEN = ("entropy", *ENGINE_GAP)
"""Metrics of a step that are sums over trained tokens; the others are sums over pairs."""


def pair_samples(
    number: int,
    *,
    chosen: tuple[Sequence[int], Sequence[bool]],
    rejected: tuple[Sequence[int], Sequence[bool]],
    prompt: int,
) -> list[TokenSample]:
    """Pair `number` of its batch, from 0, as [chosen, rejected].

    chosen, rejected: (ids [T], whether each is trained [T]); their first `prompt` tokens are equal and not trained.
    """
    return [
        with_preference(
            TokenSample(ids=ids, mask=[float(each) for each in trained], shareable=max(0, prompt - 1)), number, sign
        )
        for (ids, trained), sign in ((chosen, 1), (rejected, -1))
    ]


def with_preference(sample: TokenSample, number: int, sign: int) -> TokenSample:
    """The sample as a reply of pair `number`, from 0. sign: 1 for the chosen reply, -1 for the rejected one."""
    return replace(sample, values={**sample.values, PREFERENCE: [sign * (number + 1) * each for each in sample.mask]})


def dpo_loss(logprobs: Tensor, *, ref_logprobs: Tensor, preference: Tensor, mask: Tensor, beta: float) -> LossSum:
    """Sum over pairs of -log sigmoid(beta * margin), with

        margin = (log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))

    where log p of a reply is the sum over its trained tokens. Source: Rafailov et al. 2023, eq. 7. preference [B, S]:
    as PREFERENCE. Metrics are sums over pairs too. A margin of exactly 0, as before the first step, counts as half a
    pair ranked right. Raises ValueError if a pair is not whole.
    """
    trained = mask > 0
    policy_N, preference_N = logprobs[trained], preference[trained]
    reference_N = ref_logprobs[trained].to(policy_N.dtype)
    pairs = preference_N.abs().unique()[:, None]  # [P, 1]
    is_chosen, is_rejected = preference_N == pairs, preference_N == -pairs  # [P, N]
    if not bool((is_chosen.any(dim=1) & is_rejected.any(dim=1)).all()):
        raise ValueError("a micro-batch has one reply of a pair only: split batches in units of PAIR samples")

    def over_reply(values_N: Tensor, belongs: Tensor) -> Tensor:
        # masked sums and not index_add, whose order of additions changes from run to run on GPUs
        return torch.where(belongs, values_N, torch.zeros_like(values_N)).sum(dim=1)

    chosen, rejected = over_reply(policy_N, is_chosen), over_reply(policy_N, is_rejected)
    chosen_reward = beta * (chosen - over_reply(reference_N, is_chosen))
    rejected_reward = beta * (rejected - over_reply(reference_N, is_rejected))
    margin = chosen_reward - rejected_reward
    loss = -torch.nn.functional.logsigmoid(margin).sum()
    right = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
    measured = {
        "pair_accuracy": right,
        "reward_margin": margin,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
    }
    return LossSum(loss=loss, metrics={name: values.detach().sum() for name, values in measured.items()})


def make_dpo_loss(beta: float) -> Callable[[Tensor, MicroBatch], LossSum]:
    """The loss of a micro-batch that has "ref_logprobs"."""

    def loss(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        return dpo_loss(
            logprobs,
            ref_logprobs=batch.values["ref_logprobs"],
            preference=batch.values[PREFERENCE],
            mask=batch.mask,
            beta=beta,
        )

    return loss


def means_of_pairs(metrics: Mapping[str, float], *, pairs: int, tokens: int) -> dict[str, float]:
    """A step's metrics, which the actor divided by `pairs`, as means over what each is a sum of: pairs, or trained
    tokens (PER_TOKEN)."""
    return {name: value * pairs / tokens if name in PER_TOKEN else value for name, value in metrics.items()}
