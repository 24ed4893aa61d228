"""Losses against plain arithmetic; micro-batching does not change them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.batching import TokenSample, split_by_tokens
from collab_megatron.trainer.loss.kl import kl_estimate
from collab_megatron.trainer.loss.losses import LossSum, policy_loss, sft_loss
from collab_megatron.trainer.loss.policy_step import make_policy_loss, mini_batches, token_sample, with_values
from collab_megatron.types import TrainingSample


def grpo_loss(logprobs: Tensor, *, importance_cap: float = 2.0, **given: Any) -> LossSum:
    """policy_loss with the keys of the algorithm among the tensors."""
    keys = {key: given.pop(key) for key in ("clip_low", "clip_high", "clip_dual", "kl_coef") if key in given}
    return policy_loss(logprobs, algorithm=AlgorithmSection(importance_cap=importance_cap, **keys), **given)


def test_one_token_by_hand() -> None:
    logprob = torch.tensor([[-1.0]], requires_grad=True)
    result = grpo_loss(
        logprob,
        old_logprobs=torch.tensor([[-1.5]]),
        rollout_logprobs=torch.tensor([[-1.6]]),
        ref_logprobs=torch.tensor([[-1.2]]),
        advantages=torch.tensor([[2.0]]),
        mask=torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.1,
        importance_cap=2.0,
    )
    weight = math.exp(0.1)
    kl = math.exp(-0.2) + 0.2 - 1
    assert result.loss.item() == pytest.approx(-weight * 1.2 * 2.0 + 0.1 * kl)  # exp(0.5) is clipped to 1.2
    assert result.metrics["clip_fraction"].item() == 1.0
    assert result.metrics["kl"].item() == pytest.approx(kl)
    result.loss.backward()
    # the clipped surrogate has no gradient: only the KL's remains, d/dp (exp(r-p) - (r-p) - 1) = 1 - exp(r-p)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(0.1 * (1 - math.exp(-0.2)))


def test_a_negative_advantage_is_clipped_from_below() -> None:
    result = grpo_loss(
        torch.tensor([[-2.0]]),
        old_logprobs=torch.tensor([[-1.0]]),
        rollout_logprobs=torch.tensor([[-1.0]]),
        ref_logprobs=None,
        advantages=torch.tensor([[-1.0]]),
        mask=torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.3,
        kl_coef=0.0,
        importance_cap=2.0,
    )
    assert result.loss.item() == pytest.approx(0.8)
    assert "kl" not in result.metrics


def test_padding_never_counts_and_never_overflows() -> None:
    big = torch.tensor([[-1.0, 1e4]])  # what stands on padding must not matter, not even as inf * 0
    result = grpo_loss(
        big,
        old_logprobs=torch.tensor([[-1.0, 0.0]]),
        rollout_logprobs=torch.tensor([[-1.0, 0.0]]),
        ref_logprobs=torch.tensor([[-1.0, 0.0]]),
        advantages=torch.tensor([[1.0, 0.0]]),
        mask=torch.tensor([[1.0, 0.0]]),
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.1,
        importance_cap=2.0,
    )
    assert result.loss.item() == pytest.approx(-1.0)


@given(st.floats(-5, 0), st.floats(-5, 0))
@settings(max_examples=50, deadline=None)
def test_the_kl_estimate_is_never_negative(policy: float, reference: float) -> None:
    assert kl_estimate(torch.tensor(policy), torch.tensor(reference)).item() >= -1e-6


def ppo(log_ratio: Tensor, advantages: Tensor, **settings: float | Tensor | None) -> LossSum:
    """The loss of one row of tokens whose engine agrees with the policy at the start of the step."""
    old = torch.full_like(log_ratio, -1.0)
    wanted: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "importance_cap": 2.0}
    wanted |= {"ref_logprobs": None, "rollout_logprobs": old, **settings}
    return grpo_loss(old + log_ratio, old_logprobs=old, advantages=advantages, mask=torch.ones_like(old), **wanted)


def test_a_log_ratio_of_100_stays_finite() -> None:
    log_ratio = torch.tensor([[100.0, -100.0, 100.0, 0.05]], requires_grad=True)
    result = ppo(log_ratio, torch.tensor([[1.0, 1.0, -1.0, 1.0]]))
    result.loss.backward()
    assert log_ratio.grad is not None
    # clipped from above, at the clamp from below, at the clamp with nothing of PPO's in its way, and an ordinary one
    assert result.loss.item() == pytest.approx(-1.2 - math.exp(-20) + math.exp(20) - math.exp(0.05))
    assert log_ratio.grad[0].tolist() == pytest.approx([0.0, 0.0, 0.0, -math.exp(0.05)])
    assert result.metrics["log_ratio_clamped"].item() == 3
    assert result.largest["log_ratio_max"].item() == pytest.approx(100)
    engine_off = ppo(torch.zeros(1, 1), torch.ones(1, 1), rollout_logprobs=torch.full((1, 1), -101.0))
    assert engine_off.loss.item() == pytest.approx(-2.0)
    assert engine_off.largest["logprob_gap_max"].item() == 100


def test_a_token_far_from_the_reference_does_not_take_the_gradient_over() -> None:
    """5,000 tokens of one step, one of them 10 away from the reference: its share of the gradient's energy."""
    log_ratio = torch.zeros(1, 5000, requires_grad=True)
    reference = torch.full((1, 5000), -1.1)
    reference[0, 0] = 9.0  # log-probs themselves do not matter to the loss
    advantages = torch.where(torch.arange(5000) % 2 == 0, 1.0, -1.0)[None]
    result = ppo(log_ratio, advantages, ref_logprobs=reference, kl_coef=0.005)
    result.loss.backward()
    assert log_ratio.grad is not None
    energy = log_ratio.grad[0] ** 2
    unclamped = (-1.0 + 0.005 * (1 - math.exp(10))) ** 2
    assert unclamped / (unclamped + energy[1:].sum().item()) > 0.7
    assert energy[0] / energy.sum() < 1e-3
    assert result.metrics["kl"].item() == pytest.approx(10 + 4999 * (math.exp(-0.1) + 0.1 - 1), rel=1e-3)
    assert result.metrics["kl_clamped"].item() == 1
    assert result.largest["kl_max"].item() == pytest.approx(math.exp(10) - 11, rel=1e-5)
    assert result.largest["ref_gap_max"].item() == pytest.approx(10)


@pytest.mark.parametrize("delta", [-60.0, -11.5, -10.9, -3.0, 0.0, 2.6, 2.7, 60.0, 1000.0])
def test_the_kl_estimate_is_cut_at_ten(delta: float) -> None:
    logprob = torch.zeros(1, requires_grad=True)
    kl = kl_estimate(logprob, torch.tensor([delta]))
    kl.sum().backward()
    plain = math.exp(min(delta, 20)) - max(delta, -20.0) - 1 if delta < 20 else math.inf
    assert kl.item() == pytest.approx(min(plain, 10.0))
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(1 - math.exp(delta) if plain < 10 else 0.0)


def test_dual_clip_bounds_what_a_negative_advantage_costs() -> None:
    log_ratio, advantages = torch.tensor([[2.0, 1.0, 2.0, -1.0]]), torch.tensor([[-1.0, -1.0, 1.0, -1.0]])
    ordinary = [math.exp(2), math.exp(1), -1.2, 0.8]
    assert ppo(log_ratio, advantages).loss.item() == pytest.approx(sum(ordinary))
    assert "dual_clip_fraction" not in ppo(log_ratio, advantages).metrics
    log_ratio.requires_grad_()
    result = ppo(log_ratio, advantages, clip_dual=3.0)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(3.0 + sum(ordinary[1:]))
    assert result.metrics["dual_clip_fraction"].item() == 1
    assert log_ratio.grad is not None
    assert log_ratio.grad[0].tolist() == pytest.approx([0.0, math.exp(1), 0.0, 0.0])


def test_a_gap_that_is_no_number_is_the_largest() -> None:
    result = ppo(torch.tensor([[0.1, math.nan]]), torch.ones(1, 2))
    assert result.largest["log_ratio_max"].item() == math.inf


def test_sft_loss_is_the_sum_of_negative_logprobs() -> None:
    result = sft_loss(torch.tensor([[-1.0, -2.0, -4.0]]), mask=torch.tensor([[0.0, 1.0, 1.0]]))
    assert result.loss.item() == 6.0


def sample(length: int, advantage: float) -> TrainingSample:
    return TrainingSample(
        prompt_ids=tuple(range(1, 4)),
        reply_ids_T=tuple(range(5, 5 + length)),
        rollout_logprobs_T=tuple(-0.1 * i for i in range(length)),
        versions_T=(0,) * length,
        advantage=advantage,
    )


def _token_sample(each: TrainingSample, version: int) -> TokenSample:
    return token_sample(each, version, [each.advantage] * len(each.reply_ids_T))


@given(st.integers(8, 64), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_loss_does_not_depend_on_micro_batching(tokens: int, pad_multiple: int) -> None:
    samples = [sample(length, advantage) for length, advantage in ((1, 1.0), (4, -1.0), (7, 0.5), (2, 0.0))]

    def total(micro_batch_tokens: int, multiple: int) -> float:
        loss_fn = make_policy_loss(AlgorithmSection(kl_coef=0.1))
        result = 0.0
        batches = split_by_tokens(
            [_token_sample(s, 0) for s in samples],
            micro_batch_tokens=micro_batch_tokens,
            pad_id=0,
            pad_multiple=multiple,
        )
        for batch in batches:
            logprobs = -0.03 * batch.ids.float()
            result += loss_fn(logprobs, with_values(batch, "ref_logprobs", logprobs - 0.1)).loss.item()
        return result

    assert total(tokens, pad_multiple) == pytest.approx(total(10_000, 1), rel=1e-5)


def test_the_engines_proof_looks_at_what_the_newest_weights_sampled() -> None:
    old, new = sample(3, 1.0), replace(sample(2, 1.0), versions_T=(1, 1))
    across = replace(sample(4, 1.0), versions_T=(0, 0, 1, 1))  # its later tokens stand on the older weights' cache
    assert _token_sample(across, 1).values["on_policy"] == [0.0] * 7
    (batch,) = split_by_tokens(
        [_token_sample(s, 1) for s in (old, new)], micro_batch_tokens=99, pad_id=0, pad_multiple=1
    )
    logprobs = batch.values["rollout_logprobs"] + batch.values["on_policy"] * 0.5 + (1 - batch.values["on_policy"]) * 3
    metrics = make_policy_loss(AlgorithmSection(kl_coef=0))(logprobs, batch).metrics
    assert metrics["on_policy_share"].item() == 2
    assert metrics["on_policy_gap"].item() == pytest.approx(2 * 0.5)
    assert metrics["logprob_gap"].item() == pytest.approx(2 * 0.5 + 3 * 3)


def test_mini_batches_cover_everything_once() -> None:
    samples = [sample(1, float(i)) for i in range(7)]
    parts = mini_batches(samples, 3)
    assert [len(part) for part in parts] == [2, 3, 2]
    assert [s for part in parts for s in part] == samples
    assert len(mini_batches(samples[:2], 5)) == 2
