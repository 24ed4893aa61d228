"""Advantages that depend on the whole step: normalized over its tokens, or with the KL inside the rewards."""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.rollout.advantages import group_advantages, kl_returns, normalized_over_tokens
from collab_megatron.types import TrainingSample


def step_advantages(
    samples: Sequence[TrainingSample], algorithm: AlgorithmSection, kl_N_T: Sequence[Sequence[float]] | None = None
) -> list[list[float]]:
    """The advantage of each reply token of each sample of a step, of all ranks.

    kl_N_T: the estimates of KL(policy at the start of the step || reference) that kl_in=reward subtracts; None: the
    driver's advantages are taken. With baseline batch every token has its own return (kl_returns); else the KL of the
    whole reply lowers its reward, and the group's baseline is taken again.
    """
    if kl_N_T is None:
        found = [[sample.advantage] * len(sample.reply_ids_T) for sample in samples]
    else:
        found = _with_kl(samples, algorithm, kl_N_T)
    return normalized_over_tokens(found) if algorithm.scale == "batch_std" else found


def _with_kl(
    samples: Sequence[TrainingSample], algorithm: AlgorithmSection, kl_N_T: Sequence[Sequence[float]]
) -> list[list[float]]:
    returns = [kl_returns(sample.reward, kl_T, algorithm.kl_coef) for sample, kl_T in zip(samples, kl_N_T, strict=True)]
    if algorithm.baseline == "batch":
        return returns
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(i)
    found = [[0.0] * len(returns_T) for returns_T in returns]
    for members in groups.values():
        if len(members) < 2:
            continue  # the other replies have no tokens: there is nothing to compare with
        advantages = group_advantages(
            [returns[i][0] for i in members],
            eps=algorithm.advantage_eps,
            min_std=algorithm.min_group_std,
            baseline=algorithm.baseline,
            scale=algorithm.scale,
        )
        for i, advantage in zip(members, advantages, strict=True):
            found[i] = [advantage] * len(returns[i])
    return found
