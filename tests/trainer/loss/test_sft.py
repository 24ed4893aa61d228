"""The SFT loss and its gradient in fp64 against a plain implementation, padded and packed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from collab_megatron.trainer.batching import TokenSample, idle_like, split_by_tokens
from collab_megatron.trainer.loss.losses import sft_loss
from tests.trainer.loss.test_dpo import VOCABULARY, Bigrams


def conversations() -> list[TokenSample]:
    """Ragged, of two trained turns each; the first token of one is marked as trained, which nothing predicts."""
    rng, samples = random.Random(4), []
    for number in range(9):
        mask = [float(number == 0)]
        for trained in (0.0, 1.0, 0.0, 1.0):
            mask += [trained] * rng.randint(1, 6)
        samples.append(TokenSample([rng.randrange(VOCABULARY) for _ in mask], mask))
    return samples


SAMPLES = conversations()
TOKENS = int(sum(sum(sample.mask[1:]) for sample in SAMPLES))


def plain(table: Tensor) -> Tensor:
    """Mean negative log-likelihood, one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in SAMPLES:
        for before, token, trained in zip(sample.ids, sample.ids[1:], sample.mask[1:], strict=False):
            if trained:
                total = total + torch.logsumexp(table[before], dim=0) - table[before, token]
    return total / TOKENS


@pytest.mark.parametrize(
    "way",
    [
        {"micro_batch_tokens": 40},
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 10_000, "pad_multiple": 8},
        {"micro_batch_tokens": 40, "packed": True},
        {"micro_batch_tokens": 1, "packed": True},
        {"micro_batch_tokens": 10_000, "packed": True, "pad_multiple": 8},
    ],
    ids=str,
)
def test_loss_and_gradient_equal_the_plain_implementation(way: dict[str, Any]) -> None:
    model = Bigrams(6)
    model.table.requires_grad_()
    wanted = plain(model.table)
    (gradient,) = torch.autograd.grad(wanted, model.table)
    batches = split_by_tokens(SAMPLES, pad_id=0, **way)
    assert sum(batch.num_trained_tokens for batch in batches) == TOKENS
    found = torch.zeros((), dtype=torch.float64)
    for batch in [*batches, idle_like(batches[0], 1)]:
        found = found + sft_loss(model.logprobs(batch.ids), mask=batch.mask.double()).loss / TOKENS
    (ours,) = torch.autograd.grad(found, model.table)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.allclose(ours, gradient, rtol=1e-11, atol=1e-15)
