"""Every piece of the policy loss in fp64: by hand, against loops over replies, and in rows and ranks of any cut."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.batching import MicroBatch, TokenSample, collate, split_by_tokens
from collab_megatron.trainer.batching.micro_batch import idle_like
from collab_megatron.trainer.batching.partition import context_columns
from collab_megatron.trainer.loss.kl import kl_estimate
from collab_megatron.trainer.loss.losses import LossSum
from collab_megatron.trainer.loss.policy_step import (
    make_policy_loss,
    token_samples,
    with_advantages,
    with_values,
)
from collab_megatron.trainer.loss.sequences import Sequences, mean_weights
from collab_megatron.types import TrainingSample
from tests.trainer.loss.cases import LENGTHS, LONGEST, random_step

STEP = random_step()
ALONE: dict[str, Any] = {"importance": "none", "kl_coef": 0.0}  # the surrogate without anything around it


def loss_and_gradient(algorithm: AlgorithmSection, **given: Any) -> tuple[Tensor, Tensor, LossSum]:
    logprobs = STEP.logprobs.clone().requires_grad_()
    found = STEP.loss(logprobs, algorithm, **given)
    mean = STEP.mean(found)
    return mean.detach(), torch.autograd.grad(mean, logprobs)[0], found


def plain(of_reply: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss reply by reply: of_reply(its log-probs [T] with gradient, its number) -> scalar; their sum."""
    logprobs = STEP.logprobs.clone().requires_grad_()
    total = torch.stack([of_reply(logprobs[i, :length], i) for i, length in enumerate(LENGTHS)]).sum()
    return total.detach(), torch.autograd.grad(total, logprobs)[0]


def same(found: tuple[Tensor, Tensor, LossSum], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)


# the surrogates


def test_gspo_is_the_papers_loss_over_whole_replies() -> None:
    """mean over replies of min(s A, clip(s) A) with the gradient through s itself."""
    low, high = 0.03, 0.05
    algorithm = AlgorithmSection(preset="gspo", clip_low=low, clip_high=high, **ALONE)

    def of_reply(logprobs: Tensor, i: int) -> Tensor:
        advantage = STEP.advantages[i, 0]
        ratio = torch.exp((logprobs - STEP.old[i, : len(logprobs)]).mean())
        clipped = torch.clamp(ratio, 1 - low, 1 + high)
        return -torch.minimum(ratio * advantage, clipped * advantage) / len(LENGTHS)

    found = loss_and_gradient(algorithm)
    same(found, plain(of_reply))
    cut = sum(row.abs().sum() == 0 for row in found[1])
    assert 0 < cut < len(LENGTHS)  # some replies are clipped as a whole, others are not


def test_gspo_by_hand() -> None:
    """Log-ratios 0.3 and -0.1: s = exp(0.1), inside the range; a token's own ratio does not matter."""
    logprobs = torch.tensor([[-0.7, -1.1]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.float64)
    result = STEP.loss(
        logprobs,
        AlgorithmSection(preset="gspo", clip_low=0.2, clip_high=0.2, **ALONE),
        old_logprobs=torch.tensor([[-1.0, -1.0]], dtype=torch.float64),
        rollout_logprobs=mask * 0,
        ref_logprobs=None,
        advantages=mask * 2,
        mask=mask,
        weights=mask,
        sequences=Sequences(torch.zeros(1, 2, dtype=torch.int64), 1),
    )
    assert result.loss.item() / 2 == pytest.approx(-2 * math.exp(0.1))
    (gradient,) = torch.autograd.grad(result.loss / 2, logprobs)
    assert gradient[0].tolist() == pytest.approx([-math.exp(0.1)] * 2)  # s * A / 2 tokens
    assert result.metrics["clip_fraction"].item() == 0


def test_cispo_by_hand() -> None:
    """The weight is cut from above, and the token keeps the gradient weight * A; PPO's clip would take it away."""
    logprobs = torch.tensor([[-0.5, -1.5]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.float64)
    tensors: dict[str, Any] = {
        "old_logprobs": mask * -1.0,
        "rollout_logprobs": mask * 0,
        "ref_logprobs": None,
        "advantages": mask * 2,
        "mask": mask,
        "weights": None,
    }
    result = STEP.loss(logprobs, AlgorithmSection(preset="cispo", **ALONE), **tensors)
    assert result.loss.item() == pytest.approx(1.2 * 2 * 0.5 + math.exp(-0.5) * 2 * 1.5)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([-2.4, -2 * math.exp(-0.5)])
    assert result.metrics["clip_fraction"].item() == 1
    ppo = STEP.loss(logprobs, AlgorithmSection(**ALONE), **tensors)
    assert torch.autograd.grad(ppo.loss, logprobs)[0][0, 0].item() == 0


def test_cispo_is_a_weighted_log_likelihood() -> None:
    def of_reply(logprobs: Tensor, i: int) -> Tensor:
        weight = torch.exp(logprobs.detach() - STEP.old[i, : len(logprobs)]).clamp(max=1.2)
        return -(weight * STEP.advantages[i, 0] * logprobs).sum() / sum(LENGTHS)

    same(loss_and_gradient(AlgorithmSection(preset="cispo", **ALONE)), plain(of_reply))


def test_clip_higher_lets_a_likely_token_grow_further() -> None:
    def of_reply(logprobs: Tensor, i: int) -> Tensor:
        ratio, advantage = torch.exp(logprobs - STEP.old[i, : len(logprobs)]), STEP.advantages[i, 0]
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum() / sum(LENGTHS)

    found = loss_and_gradient(AlgorithmSection(preset="dapo", importance="none"), ref_logprobs=None)
    same(found, plain(of_reply))
    lower = loss_and_gradient(AlgorithmSection(clip_high=0.05, **ALONE))
    assert found[2].metrics["clip_fraction"] < lower[2].metrics["clip_fraction"]


# means


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_means_reply_by_reply(aggregation: Any) -> None:
    """The whole loss: importance weights, surrogate, KL and entropy have the same mean."""
    algorithm = AlgorithmSection(aggregation=aggregation, kl_coef=0.1, entropy_coef=0.05, importance_cap=1.5)
    divisors = {
        "token_mean": [sum(LENGTHS)] * len(LENGTHS),
        "sequence_mean": [len(LENGTHS) * length for length in LENGTHS],
        "constant": [len(LENGTHS) * LONGEST] * len(LENGTHS),
    }[aggregation]

    def of_reply(logprobs: Tensor, i: int) -> Tensor:
        here = (i, slice(len(logprobs)))
        ratio, advantage = torch.exp(logprobs - STEP.old[here]), STEP.advantages[i, 0]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        weight = torch.exp(STEP.old[here] - STEP.rollout[here]).clamp(max=1.5)
        away = STEP.reference[here] - logprobs
        each = -weight * surrogate + 0.1 * (torch.exp(away) - away - 1) - 0.05 * STEP.entropy[here]
        return each.sum() / divisors[i]

    same(loss_and_gradient(algorithm), plain(of_reply))


def test_mean_weights_by_hand() -> None:
    assert mean_weights([1, 3], "token_mean", longest=8) == [1.0, 1.0]
    assert mean_weights([1, 3], "sequence_mean", longest=8) == [2.0, 2 / 3]  # times 1 / 4: 1/2 and 1/6 per token
    assert mean_weights([1, 3], "constant", longest=8) == [0.25, 0.25]  # times 1 / 4: 1 / (2 * 8)


def test_the_entropy_bonus_has_the_entropys_gradient() -> None:
    entropy = STEP.entropy.clone().requires_grad_()
    result = STEP.loss(STEP.logprobs, AlgorithmSection(entropy_coef=0.01, kl_coef=0.0), entropy=entropy)
    (gradient,) = torch.autograd.grad(result.loss, entropy)
    torch.testing.assert_close(gradient, -0.01 * STEP.mask)


# KL


def test_kl_estimators_by_hand() -> None:
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_estimate(policy, reference, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(policy, reference, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(policy, reference, "k3").item() == pytest.approx(math.exp(-0.5) - 0.5)


def test_means_of_the_estimators_over_a_distribution() -> None:
    """Sampled from the policy k1 and k3 have the mean KL. Of their gradients only k2's has the KL's as its mean, and
    k1's has 0."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.1, 0.4, -0.2, 0.9], dtype=torch.float64), -1)
    policy = torch.log_softmax(logits, -1)
    exact = (policy.exp() * (policy - reference)).sum()
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    means, gradients = {}, {}
    for kind in ("k1", "k2", "k3"):
        mean = (policy.exp().detach() * kl_estimate(policy, reference, kind)).sum()
        means[kind] = mean.item()
        gradients[kind] = torch.autograd.grad(mean, logits, retain_graph=True)[0]
    assert means["k1"] == pytest.approx(exact.item())
    assert means["k3"] == pytest.approx(exact.item())
    torch.testing.assert_close(gradients["k2"], gradient)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(gradient), rtol=0, atol=1e-15)
    assert (gradients["k3"] - gradient).norm() > 0.05


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_kl_in_the_reward_is_measured_but_not_in_the_loss(kind: Any) -> None:
    in_reward = AlgorithmSection(kl_estimator=kind, kl_in="reward", kl_coef=0.5)
    found = loss_and_gradient(in_reward)
    same(found, loss_and_gradient(AlgorithmSection(kl_coef=0.0), ref_logprobs=None)[:2])
    estimates = kl_estimate(STEP.logprobs, STEP.reference, kind) * STEP.mask
    assert found[2].metrics["kl"].item() == pytest.approx(estimates.sum().item())


# importance weights


def weights_of(gap: Sequence[Sequence[float]], **keys: Any) -> tuple[list[float], LossSum]:
    """The weight of each token of two replies whose trainer-engine gaps are given: minus the loss at advantage 1."""
    gaps = torch.tensor(gap, dtype=torch.float64)
    mask = torch.ones_like(gaps)
    advantages = mask.clone().requires_grad_()
    result = STEP.loss(
        -mask,
        AlgorithmSection(kl_coef=0.0, **keys),
        old_logprobs=-mask,
        rollout_logprobs=-mask - gaps,
        ref_logprobs=None,
        advantages=advantages,
        mask=mask,
        weights=None,
        sequences=Sequences(torch.tensor([[0, 0], [1, 1]]), 2),
    )
    return (-torch.autograd.grad(result.loss, advantages)[0]).flatten().tolist(), result


def test_importance_weights_by_hand() -> None:
    log2 = math.log(2)
    gap = [[log2, 2 * log2], [-log2, 0.0]]  # tokens 2, 4, 1/2, 1; replies 8 and 1/2
    assert weights_of(gap, importance_cap=3.0)[0] == pytest.approx([2, 3, 0.5, 1])
    masked: dict[str, Any] = {"importance_beyond": "mask", "importance_cap": 3.0, "importance_floor": 0.6}
    found, result = weights_of(gap, **masked)
    assert found == pytest.approx([2, 0, 0, 1])
    figures = {name: result.metrics[name].item() for name in result.metrics if name.startswith("importance")}
    assert figures == pytest.approx({"importance_weight": 3, "importance_weight_squared": 5, "importance_beyond": 2})
    assert result.largest["importance_weight_max"].item() == pytest.approx(4)  # before it is masked
    assert weights_of(gap, importance="sequence", importance_cap=3.0)[0] == pytest.approx([3, 3, 0.5, 0.5])
    assert weights_of(gap, importance="sequence", **masked)[0] == pytest.approx([0, 0, 0, 0])
    found, result = weights_of(gap, importance="none")
    assert found == pytest.approx([1, 1, 1, 1])
    assert not [name for name in (*result.metrics, *result.largest) if name.startswith("importance")]


def test_importance_weights_carry_no_gradient() -> None:
    """With one optimizer step the policy at its start is the policy itself."""
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    batch = MicroBatch(
        ids=torch.zeros(1, 1, dtype=torch.int64),
        mask=torch.ones(1, 1, dtype=torch.float64),
        values={"rollout_logprobs": logprobs.detach() - 0.5, "advantages": torch.ones(1, 1, dtype=torch.float64)},
        sample_indices=(0,),
        lengths=(1,),
    )
    loss = make_policy_loss(AlgorithmSection(kl_coef=0.0))(logprobs, batch).loss
    assert torch.autograd.grad(loss, logprobs)[0].item() == pytest.approx(-math.exp(0.5))  # not twice that


# rows, micro-batches and ranks


CUT = {
    "gspo": AlgorithmSection(preset="gspo", clip_low=0.03, clip_high=0.05),
    "sequence-weights": AlgorithmSection(importance="sequence", importance_cap=1.5, aggregation="constant"),
    "sequence-masked": AlgorithmSection(
        preset="gspo", importance="sequence", importance_beyond="mask", importance_floor=0.5, clip_low=0.2
    ),
    "dr_grpo": AlgorithmSection(preset="dr_grpo"),
    "cispo": AlgorithmSection(preset="cispo"),
}
PROMPTS = (3, 3, 3, 3, 2, 2, 2, 2)


def as_samples(algorithm: AlgorithmSection) -> list[TokenSample]:
    """The step's replies behind prompts, two of them shared."""
    samples = [
        TrainingSample(
            tuple(range(1, 1 + prompt)),
            tuple(100 + i for i in range(length)),
            tuple(STEP.rollout[row, :length].tolist()),
            (0,) * length,
            STEP.advantages[row, 0].item(),
        )
        for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    advantages = [[sample.advantage] * len(sample.reply_ids_T) for sample in samples]
    made = token_samples(samples, advantages, algorithm, version=0, longest=LONGEST)
    return [
        replace(
            sample,
            values={
                **sample.values,
                **{
                    name: [0.0] * prompt + of[row, :length].tolist()
                    for name, of in (
                        ("logprobs", STEP.logprobs),
                        ("old_logprobs", STEP.old),
                        ("ref_logprobs", STEP.reference),
                    )
                },
            },
        )
        for row, (sample, prompt, length) in enumerate(zip(made, PROMPTS, LENGTHS, strict=True))
    ]


def ready(batch: MicroBatch, algorithm: AlgorithmSection) -> MicroBatch:
    return with_values(batch, "sequence", batch.numbered()) if algorithm.reduces_over_replies else batch


def measured(algorithm: AlgorithmSection, batch: MicroBatch, context: int = 1) -> dict[str, float]:
    """Loss and metrics of a micro-batch, whose row is cut for `context` ranks: one thread each, sums over them all."""
    labelled = ready(batch, algorithm).by_predicting_position()
    barrier, sums = threading.Barrier(context), [torch.empty(0)] * context
    results: list[LossSum] = [LossSum(torch.empty(0), {})] * context

    def rank(number: int) -> None:
        def reduce(mine: Tensor) -> Tensor:
            sums[number] = mine
            barrier.wait(10)
            total = torch.stack(sums).sum(0)
            barrier.wait(10)
            return total

        part = labelled
        if context > 1:
            part = labelled.take_columns(context_columns(labelled.ids.shape[1], number, context))
        results[number] = make_policy_loss(algorithm, reduce)(part.values["logprobs"], part)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(context)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    found = {name: sum(result.metrics[name].item() for result in results) for name in results[0].metrics}
    return {**found, "loss": sum(result.loss.item() for result in results)}


def whole(algorithm: AlgorithmSection) -> dict[str, float]:
    """The same from one row per reply in fp64."""
    result = STEP.loss(STEP.logprobs, algorithm)
    return {**{name: value.item() for name, value in result.metrics.items()}, "loss": result.loss.item()}


@pytest.mark.parametrize("name", list(CUT))
@pytest.mark.parametrize("how", ["padded", "packed", "shared", "context 2", "context 4 packed"])
@pytest.mark.parametrize("tokens", [12, 1000])
def test_cuts_do_not_change_the_loss(name: str, how: str, tokens: int) -> None:
    """Micro-batches, packed rows, shared prompts and context ranks: the same sums. fp32 against fp64."""
    algorithm = CUT[name]
    context = int(how.split()[1]) if how.startswith("context") else 1
    batches = split_by_tokens(
        as_samples(algorithm),
        micro_batch_tokens=tokens,
        pad_id=0,
        pad_multiple=2 * context if context > 1 else 1,
        packed="packed" in how,
        share=how == "shared",
    )
    assert (len(batches) > 1) == (tokens == 12)
    found: dict[str, float] = {}
    idle = idle_like(ready(batches[0], algorithm), 2 * context)
    for batch in (*batches, idle):
        for figure, value in measured(algorithm, batch, context).items():
            found[figure] = found.get(figure, 0.0) + value
    for figure, value in whole(algorithm).items():
        assert found[figure] == pytest.approx(value, rel=1e-5, abs=1e-5), figure


def test_a_sum_over_one_context_rank_alone_would_be_wrong() -> None:
    """The test above can fail: without the reduction a reply's ratio is that of its tokens on one rank."""
    algorithm = CUT["gspo"]
    (batch,) = split_by_tokens(as_samples(algorithm), micro_batch_tokens=1000, pad_id=0, pad_multiple=4)
    labelled = ready(batch, algorithm).by_predicting_position()
    total = 0.0
    for rank in range(2):
        part = labelled.take_columns(context_columns(labelled.ids.shape[1], rank, 2))
        total += make_policy_loss(algorithm)(part.values["logprobs"], part).loss.item()
    assert abs(total - whole(algorithm)["loss"]) > 0.01


def test_advantages_are_replaced_in_their_places() -> None:
    samples = as_samples(AlgorithmSection())[:3]
    for packed, share in ((False, False), (True, False), (True, True)):
        batch = collate([samples[i] for i in (2, 0, 1)], (2, 0, 1), 0, 4, packed, share)
        wanted = [[float(10 * i + t) for t in range(LENGTHS[i])] for i in range(3)]
        found = with_advantages(batch, wanted)
        for index, values_T in zip(found.sample_indices, found.per_sample(found.values["advantages"]), strict=True):
            assert values_T.tolist() == [0.0] * PROMPTS[index] + wanted[index]
        assert found.values["advantages"].sum().item() == sum(map(sum, wanted))
