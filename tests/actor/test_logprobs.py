"""Log-probs and entropy from logits against torch's own; two ranks are checked in tests/parallel."""

from __future__ import annotations

import pytest
import torch

from collab_megatron.actor.logprobs import logprobs_and_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [10**9, 100])
@pytest.mark.parametrize("vocab", [40, 33])
def test_values_and_gradient(dtype: torch.dtype, chunk_elements: int, vocab: int) -> None:
    """fp32: 1e-6. bf16 logits: the same, since everything after them is fp32; their gradient is rounded to bf16."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 3, 40, generator=generator) * 5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (7, 3), generator=generator)
    weight = torch.randn(7, 3, generator=generator)
    before = logits.detach().clone()
    logprobs, entropy = logprobs_and_entropy(logits, labels, vocab=vocab, chunk_elements=chunk_elements)
    (logprobs * weight).sum().backward()

    same = before.float().requires_grad_()
    wanted = torch.log_softmax(same[..., :vocab], dim=-1)
    picked = wanted.gather(-1, labels[..., None])[..., 0]
    (picked * weight).sum().backward()
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, picked, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy, -(wanted.exp() * wanted).sum(-1), rtol=1e-6, atol=1e-5)
    assert logits.grad is not None
    assert same.grad is not None
    torch.testing.assert_close(
        logits.grad, same.grad.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert not logits.grad[..., vocab:].any()
    assert torch.equal(logits, before)  # upstream's cross entropy overwrites them
    assert not entropy.requires_grad


def test_huge_logits_stay_finite() -> None:
    logprobs, entropy = logprobs_and_entropy(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1]), vocab=3)
    assert logprobs.item() == -2e4
    assert entropy.item() == pytest.approx(0.0, abs=1e-6)


def test_a_rank_of_padding_only_still_has_a_backward_pass() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    logprobs, _ = logprobs_and_entropy(logits, torch.tensor([0, 1]), vocab=4, tp_rank=1)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()
