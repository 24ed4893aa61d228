"""Hand-written backward passes against autograd's: exact in float64, within rounding in bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from collab_megatron.trainer.local.kernels import linear, rms_norm, rope, short_attention, swiglu

EPS = 1e-6


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def ours_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return short_attention(q, k, v, None)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), plain_rms_norm, [(5, 3, 16), (16,)]),
    "rms_norm per head": (lambda x, w: rms_norm(x, w, EPS), plain_rms_norm, [(5, 3, 4, 8), (8,)]),
    "swiglu": (swiglu, plain_swiglu, [(5, 3, 12)]),
    "rope": (rope, plain_rope, [(5, 2, 3, 8), (5, 1, 1, 4), (5, 1, 1, 4)]),
    "linear": (lambda x, w: linear(x, w, None), F.linear, [(5, 3, 8), (6, 8)]),
    "linear with bias": (linear, F.linear, [(5, 3, 8), (6, 8), (6,)]),
    "attention": (
        ours_attention,
        plain_attention,
        [(2, 6, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8)],
    ),
    "attention alone": (ours_attention, plain_attention, [(1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8)]),
}


def make(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
    out = function(*inputs)
    torch.manual_seed(1)
    weights = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return out, torch.autograd.grad(out, inputs, weights, allow_unused=True)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_autograd(name: str) -> None:
    ours, plain, shapes = CASES[name]
    out, grads = gradients(ours, make(shapes))
    wanted, wanted_grads = gradients(plain, make(shapes))
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        if grad is not None:  # angles are not trained
            torch.testing.assert_close(grad, wanted_grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_no_further_from_the_truth_than_autograd_on_the_plain_formula(name: str) -> None:
    ours, plain, shapes = CASES[name]
    rounded = make(shapes, torch.bfloat16)
    exact, exact_grads = gradients(plain, [x.detach().double().requires_grad_() for x in rounded])
    out, grads = gradients(ours, rounded)
    other, other_grads = gradients(plain, rounded)
    assert out.dtype == torch.bfloat16

    def error(found: Tensor, wanted: Tensor) -> float:
        return float(((found.double() - wanted).norm() / (wanted.norm() + 1e-9)).detach())

    assert error(out, exact) <= 1.3 * error(other, exact) + 1e-3
    for grad, other_grad, exact_grad in zip(grads, other_grads, exact_grads, strict=True):
        if grad is not None:
            assert error(grad, exact_grad) <= 1.3 * error(other_grad, exact_grad) + 1e-3


def test_rope_lays_heads_out_for_attention() -> None:
    x, cos, sin = make([(5, 2, 3, 8), (5, 1, 1, 4), (5, 1, 1, 4)])
    assert rope(x, cos, sin).permute(1, 2, 0, 3).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_fills_the_gradient_buffer_first_and_adds_to_it_afterwards(dtype: torch.dtype) -> None:
    x, weight = make([(5, 3, 8), (6, 8)], dtype)
    parameter: Any = torch.nn.Parameter(weight.detach())
    parameter.main_grad = torch.full((6, 8), float("nan"))  # what a first gradient overwrites
    parameter.grad_added_to_main_grad = False
    _, (wanted,) = gradients(lambda w: F.linear(x, w), [parameter])
    for times in (1, 2, 3):
        linear(x, parameter, None).backward(torch.ones(5, 3, 6, dtype=dtype))
        assert parameter.grad_added_to_main_grad
        assert parameter.grad is not None  # the stand-in that lets hooks run
        parameter.grad = None
        plain = torch.ones(6, 15, dtype=dtype) @ x.detach().flatten(0, 1)
        torch.testing.assert_close(parameter.main_grad, times * plain.float(), rtol=1e-5, atol=1e-5)
    assert wanted.shape == parameter.shape


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = make([(5, 8), (6, 8)])
    linear(x, weight.detach(), None).sum().backward()
    assert x.grad is not None
