"""Loss and gradients of a real transformer in fp64: our batches and losses against a reply at a time.

transformers computes norms and softmax in fp32 whatever the dtype, so sums over rows of other lengths agree to 1e-7 and
gradients to 1e-5. test_dpo.py and test_sft.py have a model that is fp64 throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from collab_megatron.trainer.batching import split_by_tokens
from collab_megatron.trainer.loss.dpo import PAIR, make_dpo_loss
from collab_megatron.trainer.loss.losses import sft_loss
from collab_megatron.trainer.loss.policy_step import with_values
from collab_megatron.trainer.supervised.dpo import PAIRS as PAIRS_OF_ROWS
from collab_megatron.trainer.supervised.sft import CONVERSATIONS
from tests.trainer.parallel.plain_supervised import BETA, PAIRS, ROWS, dpo, sft, trained_tokens
from tests.trainer.parallel.tiny import make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A policy and another model as its reference."""
    folder: Path = tmp_path_factory.mktemp("models")
    found = []
    for seed in (1, 2):
        path = make_model(folder / str(seed), "qwen3", seed=seed)
        found.append(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager"))
    return found[0], found[1]


def logprobs(model: Any, ids: Tensor) -> Tensor:
    """[B, S] -> [B, S], 0 at the first token; padding is on the right, so attention never sees it."""
    taken = torch.log_softmax(model(ids).logits[:, :-1].double(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return F.pad(taken, (1, 0))


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def require_same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for found, plain in zip(ours, wanted, strict=True):
        assert (found - plain).norm() <= 1e-5 * plain.norm().clamp(min=1e-4)
    assert max(plain.abs().max() for plain in wanted) > 1e-3


@pytest.mark.parametrize("tokens", [1, 80, 10_000])
@pytest.mark.slow
def test_dpo(models: tuple[Any, Any], tokens: int) -> None:
    policy, reference = models
    wanted, figures = dpo(policy, reference)
    loss_fn, total, margin = make_dpo_loss(BETA), torch.zeros((), dtype=torch.float64), 0.0
    for batch in split_by_tokens(PAIRS_OF_ROWS.samples(PAIRS), micro_batch_tokens=tokens, pad_id=0, unit=PAIR):
        scored = with_values(batch, "ref_logprobs", logprobs(reference, batch.ids).detach())
        found = loss_fn(logprobs(policy, batch.ids), scored)
        total, margin = total + found.loss / len(PAIRS), margin + found.metrics["reward_margin"].item() / len(PAIRS)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-7)
    assert margin == pytest.approx(figures["reward_margin"], rel=1e-6)
    assert abs(margin) > 0.01
    require_same(gradients(policy, total), gradients(policy, wanted))


@pytest.mark.parametrize("tokens", [1, 60])
def test_sft(models: tuple[Any, Any], tokens: int) -> None:
    policy, _ = models
    wanted, _ = sft(policy, None)
    total = torch.zeros((), dtype=torch.float64)
    for batch in split_by_tokens(CONVERSATIONS.samples(ROWS), micro_batch_tokens=tokens, pad_id=0):
        found = sft_loss(logprobs(policy, batch.ids), mask=batch.mask.double())
        total = total + found.loss / trained_tokens(ROWS)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-7)
    require_same(gradients(policy, total), gradients(policy, wanted))
