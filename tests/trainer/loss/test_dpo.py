"""The DPO loss and its gradient in fp64 against a plain implementation, however the batch is divided."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from collab_megatron.config.sections import TrainSection
from collab_megatron.trainer.batching import MicroBatch, TokenSample, collate, idle_like, split_by_tokens
from collab_megatron.trainer.loss.dpo import PAIR, PREFERENCE, dpo_loss, make_dpo_loss, means_of_pairs, pair_samples
from collab_megatron.trainer.loss.policy_step import with_values
from collab_megatron.trainer.rank_batch import rank_batch
from tests.trainer.one_process import SPEC, grid_of

VOCABULARY, BETA = 30, 0.7
PAIRS = 7


def make_pairs(count: int = PAIRS) -> list[TokenSample]:
    """Ragged, chosen and rejected in turn; prompts of pairs 1 and 2 are equal; pair 3 has trained and untrained tokens
    after its prompt, as a continuation of several turns has."""
    rng = random.Random(5)
    samples: list[TokenSample] = []
    prompt = [1]
    for number in range(count):
        if number != 2:
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 9))]
        replies = []
        for _ in range(PAIR):
            reply = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 8))]
            trained = [True] * len(reply)
            if number == 3:
                reply, trained = [*reply, 5, 6, 7], [*trained, False, False, True]
            replies.append(([*prompt, *reply], [False] * len(prompt) + trained))
        samples += pair_samples(number, chosen=replies[0], rejected=replies[1], prompt=len(prompt))
    return samples


SAMPLES = make_pairs()


class Bigrams:
    """The simplest model with a gradient: logits of a token given the one before it, in fp64."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator)

    def logprobs(self, ids: Tensor) -> Tensor:
        """[B, S] -> [B, S], each at its own token, 0 at the first."""
        found = torch.log_softmax(self.table[ids[:, :-1]], dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        return F.pad(found, (1, 0))


def plain(policy: Tensor, reference: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean DPO loss over the pairs of SAMPLES and its figures, one reply at a time, from tables of logits."""

    def log_p(table: Tensor, sample: TokenSample) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for position in range(1, len(sample.ids)):
            if sample.mask[position]:
                row = table[sample.ids[position - 1]]
                total = total + row[sample.ids[position]] - torch.logsumexp(row, dim=0)
        return total

    losses, figures = [], {"pair_accuracy": 0.0, "reward_margin": 0.0, "chosen_logprob": 0.0, "rejected_logprob": 0.0}
    for chosen, rejected in zip(SAMPLES[::2], SAMPLES[1::2], strict=True):
        better = log_p(policy, chosen) - log_p(reference, chosen)
        worse = log_p(policy, rejected) - log_p(reference, rejected)
        losses.append(torch.log1p(torch.exp(-BETA * (better - worse))))
        figures["pair_accuracy"] += (better > worse).item() / PAIRS
        figures["reward_margin"] += BETA * (better - worse).item() / PAIRS
        figures["chosen_logprob"] += log_p(policy, chosen).item() / PAIRS
        figures["rejected_logprob"] += log_p(policy, rejected).item() / PAIRS
    return torch.stack(losses).mean(), figures


def divided(policy: Bigrams, reference: Bigrams, batches: list[MicroBatch]) -> tuple[Tensor, dict[str, float]]:
    """The same from micro-batches, as the actor computes it."""
    loss_fn, total, sums = make_dpo_loss(BETA), torch.zeros((), dtype=torch.float64), dict[str, float]()
    for batch in batches:
        # what is outside the mask, such as the border of two packed samples, must have no effect
        noise = torch.rand(2, *batch.ids.shape, dtype=torch.float64) * (1 - batch.mask)
        scored = with_values(batch, "ref_logprobs", reference.logprobs(batch.ids).detach() + noise[0])
        found = loss_fn(policy.logprobs(batch.ids) + noise[1], scored)
        total = total + found.loss / PAIRS
        for name, value in found.metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item() / PAIRS
    return total, sums


WAYS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_tokens": 40},
    "padded, all in one": {"micro_batch_tokens": 10_000},
    "padded, a pair at a time": {"micro_batch_tokens": 1},
    "packed": {"micro_batch_tokens": 50, "packed": True, "pad_multiple": 4},
    "packed, a pair at a time": {"micro_batch_tokens": 1, "packed": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_loss_gradient_and_figures_equal_the_plain_implementation(way: str) -> None:
    policy, reference = Bigrams(1), Bigrams(2)
    policy.table.requires_grad_()
    wanted, figures = plain(policy.table, reference.table)
    (gradient,) = torch.autograd.grad(wanted, policy.table)
    batches = split_by_tokens(SAMPLES, pad_id=0, unit=PAIR, **WAYS[way])
    idle = idle_like(batches[0], 1)
    found, sums = divided(policy, reference, [*batches, idle])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert {name: sums[name] for name in figures} == pytest.approx(figures, rel=1e-12)
    assert sums["reward_margin"] == pytest.approx(sums["chosen_reward"] - sums["rejected_reward"], rel=1e-9)
    (ours,) = torch.autograd.grad(found, policy.table)
    assert torch.allclose(ours, gradient, rtol=1e-11, atol=1e-14)
    assert gradient.abs().max() > 1e-3


def test_a_prompt_that_a_pair_shares_changes_neither_loss_nor_gradient() -> None:
    """Of the row's tokens only those of the replies count, so a table of per-token log-probs stands for the model."""
    whole = split_by_tokens(SAMPLES, micro_batch_tokens=10_000, pad_id=0, unit=PAIR)
    shared = split_by_tokens(SAMPLES, micro_batch_tokens=45, pad_id=0, unit=PAIR, packed=True, share=True)
    assert sum(batch.num_tokens for batch in shared) < sum(batch.num_tokens for batch in whole)
    assert len(shared) > 2
    generator = torch.Generator().manual_seed(3)
    logprobs = [torch.randn(len(sample.ids), dtype=torch.float64, generator=generator) for sample in SAMPLES]
    found = []
    for batches in (whole, shared):
        leaves = [values.clone().requires_grad_() for values in logprobs]
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            placed = torch.zeros(batch.ids.shape, dtype=torch.float64)
            for index, (row, columns) in zip(batch.sample_indices, batch.spans(), strict=True):
                own = leaves[index][len(leaves[index]) - (columns.stop - columns.start) :]
                placed = placed.index_put((torch.tensor(row), torch.arange(columns.start, columns.stop)), own)
            scored = with_values(batch, "ref_logprobs", torch.zeros(batch.ids.shape))
            total = total + make_dpo_loss(BETA)(placed, scored).loss
        total.backward()
        found.append((total.item(), [leaf.grad for leaf in leaves]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for ours, wanted in zip(found[1][1], found[0][1], strict=True):
        assert ours is not None
        assert wanted is not None
        assert torch.allclose(ours, wanted, rtol=1e-12, atol=0)


def test_one_pair_by_hand() -> None:
    """Log-probs -1 and -2 for the chosen reply of two tokens, -4 for the rejected one; reference -2 each."""
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -4.0, 0.0]], dtype=torch.float64, requires_grad=True)
    samples = pair_samples(0, chosen=([1, 2, 3], [False, True, True]), rejected=([1, 4], [False, True]), prompt=1)
    batch = collate(samples, (0, 1), pad_id=0, pad_multiple=1, packed=False)
    found = dpo_loss(
        logprobs,
        ref_logprobs=torch.full((2, 3), -2.0),
        preference=batch.values[PREFERENCE],
        mask=batch.mask,
        beta=0.5,
    )
    margin = 0.5 * ((-3.0 + 4.0) - (-4.0 + 2.0))
    assert margin == 1.5
    assert found.loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert {name: value.item() for name, value in found.metrics.items()} == {
        "pair_accuracy": 1.0,
        "reward_margin": 1.5,
        "chosen_reward": 0.5,
        "rejected_reward": -1.0,
        "chosen_logprob": -3.0,
        "rejected_logprob": -4.0,
    }
    found.loss.backward()
    slope = 0.5 / (1 + math.exp(1.5))  # beta * sigmoid(-margin)
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx([0, -slope, -slope, 0, slope, 0])


def test_before_the_first_step_every_margin_is_zero() -> None:
    (batch,) = split_by_tokens(SAMPLES, micro_batch_tokens=10_000, pad_id=0, unit=PAIR)
    logprobs = Bigrams(1).logprobs(batch.ids)
    found = make_dpo_loss(BETA)(logprobs, with_values(batch, "ref_logprobs", logprobs))
    assert found.loss.item() == pytest.approx(PAIRS * math.log(2))
    assert found.metrics["pair_accuracy"].item() == PAIRS / 2


def test_half_a_pair_is_refused() -> None:
    batch = collate(SAMPLES[:3], (0, 1, 2), pad_id=0, pad_multiple=1, packed=False)
    with pytest.raises(ValueError, match="one reply of a pair only"):
        make_dpo_loss(BETA)(torch.zeros(batch.ids.shape), with_values(batch, "ref_logprobs", batch.mask))
    with pytest.raises(ValueError, match="3 samples are not units of 2"):
        split_by_tokens(SAMPLES[:3], micro_batch_tokens=100, pad_id=0, unit=PAIR)


@pytest.mark.parametrize("train", [{"share_prompts": False}, {"share_prompts": False, "packing": True}, {}])
def test_a_pair_stays_on_one_data_rank_and_in_one_micro_batch(train: dict[str, bool]) -> None:
    section = TrainSection(micro_batch_tokens=48, **train)
    seen: list[int] = []
    for rank in range(3):
        for batch in rank_batch(grid_of(rank, 3), SPEC, SAMPLES, section, unit=PAIR).micro_batches:
            numbers = batch.values[PREFERENCE][batch.mask > 0]
            assert set(numbers[numbers > 0].tolist()) == set((-numbers[numbers < 0]).tolist())
            seen += sorted({int(number) for number in numbers[numbers > 0]})
            assert (batch.values[PREFERENCE] != 0).equal(batch.mask > 0)
    assert sorted(seen) == list(range(1, PAIRS + 1))


def test_sums_over_tokens_become_means_over_tokens() -> None:
    metrics = {"loss": 0.5, "entropy": 30.0, "on_policy_share": 10.0}  # 4 pairs with 40 tokens
    assert means_of_pairs(metrics, pairs=4, tokens=40) == {"loss": 0.5, "entropy": 3.0, "on_policy_share": 1.0}
