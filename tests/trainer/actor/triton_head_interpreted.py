"""Run by test_triton_head.py with TRITON_INTERPRET=1: the Triton head on a CPU against torch's operations.

Triton decides when a kernel is defined whether it is interpreted, so this has a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from collab_megatron.trainer.actor import head_parts, triton_head
from collab_megatron.trainer.actor import logprobs as head
from collab_megatron.trainer.actor.triton_head import TritonHeadLogprobs

N, H, V = 9, 16, 70
# fp32: rounding of the last digit. bf16: the torch head rounds the softmax, this one its product with the factor
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


def run(
    implementation: Any,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    real: int = V,
    columns: int = V,
    keep: bool = False,
    group: Any = None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """Log-probability, entropy, gradient of hidden, gradient of weight."""
    inputs = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    found = implementation.apply(*inputs, labels, real, columns, keep, group, False, temperature)
    factor = torch.linspace(-1.0, 2.0, len(labels))
    (found[0] * factor).sum().backward()
    gradients = [values.grad for values in inputs]
    assert all(values is not None for values in gradients)
    return (*found, *gradients)  # type: ignore[return-value]


def made(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).to(dtype) for n in (N, V))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[0], labels[1] = V - 1, 0
    return hidden, weight, labels


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], bound: float) -> None:
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.dtype == reference.dtype
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(ours, reference, rtol=0, atol=bound * scale)


def check_numbers() -> None:
    for dtype, bound in BOUNDS.items():
        inputs = made(dtype)
        for options in (
            {},
            {"keep": True},
            {"columns": 32},  # the last tile is narrower than the others
            {"columns": 32, "keep": True, "real": 65},  # padding
            {"columns": 1, "temperature": 1.3},
            {"temperature": 0.7},
        ):
            labels = inputs[2].clamp(max=options.get("real", V) - 1)
            wanted = run(head._HeadLogprobs, *inputs[:2], labels, **options)
            close(run(TritonHeadLogprobs, *inputs[:2], labels, **options), wanted, bound)


def check_blocks() -> None:
    """A row of several blocks, and one that is not a multiple of them."""
    inputs = made(torch.float32)
    wanted = run(head._HeadLogprobs, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_head, "ROW_BLOCK", 16)
        patch.setattr(triton_head, "GRADIENT_BLOCK", 16)
        close(run(TritonHeadLogprobs, *inputs), wanted, BOUNDS[torch.float32])


def check_extremes() -> None:
    """A label with e**-16384 of the probability, and a token that is almost certain, whose gradient is 5e-5."""
    hidden, weight = torch.tensor([[8192.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    logprob, entropy, hidden_grad, _ = run(TritonHeadLogprobs, hidden, weight, torch.tensor([1]), real=3, columns=3)
    assert logprob.item() == -16384
    assert abs(entropy.item()) < 1e-6
    torch.testing.assert_close(hidden_grad, torch.tensor([[2.0]]))  # the factor of the only token is -1
    hidden = torch.eye(2, dtype=torch.bfloat16)[:1]
    weight = torch.tensor([[10.0, 3.0], [0.0, 1.0]], dtype=torch.bfloat16)
    _, _, hidden_grad, _ = run(TritonHeadLogprobs, hidden, weight, torch.tensor([0]), real=2, columns=2)
    other = torch.sigmoid(torch.tensor(-10.0))
    torch.testing.assert_close(hidden_grad.float(), -other * torch.tensor([[10.0, 2.0]]), rtol=0.03, atol=0)


def check_no_tokens_and_no_columns() -> None:
    hidden, weight, labels = made(torch.float32)
    *_, weight_grad = run(TritonHeadLogprobs, hidden[:0], weight, labels[:0])
    assert not weight_grad.any()
    found = run(TritonHeadLogprobs, hidden, weight, labels - V, real=0)  # a rank with padding only
    assert all(values.isfinite().all() for values in found)
    assert not found[2].any()
    assert not found[3].any()


def check_two_ranks() -> None:
    """Halves of the vocabulary, each with the all-gather's answer of both."""
    hidden, weight, labels = made(torch.float32)
    wanted = run(head._HeadLogprobs, hidden, weight, labels)
    sent: list[Tensor] = []

    def all_gather(shards: list[Tensor], mine: Tensor, group: Any) -> None:
        sent.append(mine.clone())
        for shard, first_sent in zip(shards, sent, strict=False):
            shard.copy_(first_sent)

    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_parts.dist, "all_gather", all_gather)
        patch.setattr(head_parts.dist, "get_world_size", lambda group: 2)
        for rank in (0, 1, 0, 1):  # the first round only to learn what each sends
            half, first = weight.chunk(2)[rank], rank * V // 2
            parts.append(run(TritonHeadLogprobs, hidden, half, labels - first, real=V // 2, group=object()))
    for part in parts[2:]:
        close(part[:2], wanted[:2], 2e-6)
    torch.testing.assert_close(parts[2][2] + parts[3][2], wanted[2])
    torch.testing.assert_close(torch.cat([parts[2][3], parts[3][3]]), wanted[3])


def check_a_second_backward_pass() -> None:
    """The first overwrites the logits that were kept."""
    hidden, weight, labels = made(torch.float32)
    hidden.requires_grad_()
    logprobs, entropy = TritonHeadLogprobs.apply(hidden, weight, labels, V, V, True, None, False, 1.0)
    assert not entropy.requires_grad
    logprobs.sum().backward(retain_graph=True)
    once = hidden.grad
    (twice,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert once is not None
    torch.testing.assert_close(once, twice)


def main() -> None:
    for check in (
        check_numbers,
        check_blocks,
        check_extremes,
        check_no_tokens_and_no_columns,
        check_two_ranks,
        check_a_second_backward_pass,
    ):
        check()
        print(check.__name__)
    assert head._difference(TritonHeadLogprobs, torch.device("cpu")) < head.TRIAL_BOUND


if __name__ == "__main__":
    main()
