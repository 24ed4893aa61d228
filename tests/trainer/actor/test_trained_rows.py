"""The output head gets the trained positions only, and everything else is 0."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from collab_megatron.trainer.actor import actor, policy_model
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.policy_model import PolicyModel
from collab_megatron.trainer.batching.micro_batch import MicroBatch, TokenSample, collate, idle_like
from collab_megatron.trainer.loss.losses import LossSum

H, V = 4, 11
SAMPLES = [
    TokenSample([1, 2, 3, 4, 5], [0.0, 0.0, 0.0, 1.0, 1.0]),
    TokenSample([6, 7, 8], [1.0, 0.0, 1.0]),  # the first token has nothing before it
]


def head_of(batch: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """(hidden states, what the model returns for them, labels that the head saw, its hidden states)."""
    seen: list[Any] = []

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        assert given["entropy_gradient"]  # as the model has it
        seen.append((labels.tolist(), hidden.detach()))
        return hidden.sum(dim=1), torch.full((len(hidden),), 2.0)

    monkeypatch.setattr(policy_model, "head_logprobs", head)
    labelled = batch.by_predicting_position()
    rows, length = batch.ids.shape
    hidden = torch.randn(length, rows, H, requires_grad=True)
    model = SimpleNamespace(
        post_process=True,
        pre_process=True,
        share_embeddings_and_output_weights=False,
        output_layer=SimpleNamespace(weight=torch.zeros(V, H)),
        spec=SimpleNamespace(vocab=V),
        grid=SimpleNamespace(tp_size=1, tp_rank=0, sequence_parallel=False),
        logits_chunk_bytes=1,
        temperature=1.0,
        entropy_gradient=True,
    )
    out = PolicyModel._postprocess(cast(Any, model), hidden, labels=labelled.ids, loss_mask=labelled.trained_rows())
    assert out.shape == (2, rows, length)
    labels, selected = seen[0]
    return hidden, out, labels, selected


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_have_no_logits(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(SAMPLES, (0, 1), 0, 1, packed)
    hidden, out, labels, selected = head_of(batch, monkeypatch)
    assert sorted(labels) == [4, 5, 8]
    assert len(selected) == batch.num_trained_tokens == 3
    mask = batch.by_predicting_position().mask
    assert torch.equal(out[1], mask * 2.0)
    assert torch.equal(out[0], hidden.sum(dim=-1).t() * mask)
    out[0].sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, mask.t()[..., None].expand_as(hidden))


def test_a_micro_batch_that_trains_nothing_still_has_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, out, labels, _ = head_of(idle_like(collate(SAMPLES, (0, 1), 0, 1, False), 4), monkeypatch)
    assert labels == []
    out.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert not out.any()


@pytest.mark.parametrize("bonus", [False, True])
def test_a_loss_gets_the_entropy_with_its_gradient_where_it_has_one(
    bonus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(SAMPLES, (0, 1), 0, 1, True).by_predicting_position()
    output = torch.arange(2.0 * batch.mask.numel()).view(2, *batch.mask.shape).requires_grad_()
    monkeypatch.setattr(actor, "forward", lambda model, batch, grid: (output, batch))
    chunk = SimpleNamespace(entropy_gradient=bonus)
    owner: Any = SimpleNamespace(grid=None, chunks=[chunk])

    def loss_fn(logprobs: Tensor, seen: MicroBatch) -> LossSum:
        assert ("entropy" in seen.values) == bonus
        entropy = seen.values.get("entropy", torch.zeros(()))
        return LossSum(((3 * logprobs - 2 * entropy) * seen.mask).sum(), {})

    _, loss = Actor._loss_step(owner, loss_fn, 4.0, iter([batch]), chunk)
    loss(output)[0].backward()
    assert output.grad is not None
    assert torch.equal(output.grad[0], 0.75 * batch.mask)
    assert torch.equal(output.grad[1], -0.5 * bonus * batch.mask)
