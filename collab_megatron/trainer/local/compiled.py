"""Norm, rotary embedding and gated activation, compiled by torch: for GPUs without transformer-engine.

Each is one kernel forward and one or two backward, where the hand-written ones of kernels.py launch five to ten that
read and write whole tensors. A GPU pays for that as a CPU does, but a CPU would also pay a compiler's minute.

A function is tried once, with its gradients, against the same function without the compiler; if that fails or differs,
the hand-written one is used. TORCH_COMPILE_DISABLE=1, torch's own switch, compiles nothing. Written against torch 2.13;
rows are marked as dynamic, so that micro-batches of other lengths compile nothing again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collab_megatron.trainer.local.trials import with_gradients

logger = logging.getLogger(__name__)

BOUND = 1e-4  # of the trial, in fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [n, hidden], weight [hidden]; rounded to x's dtype before the weight, as in Hugging Face's models."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [s, b, h, d] rotated by angles whose cosines and sines are [s, 1, 1, d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(x: Tensor) -> Tensor:
    """x [n, 2*ffn], gate before up -> [n, ffn]; in fp32 between the two roundings."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


TRIALS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[float, ...]]] = {
    "rms_norm": (rms_norm, ((6, 64), (64,)), (1e-6,)),
    "rope": (rope, ((6, 2, 3, 64), (6, 1, 1, 32), (6, 1, 1, 32)), ()),
    "swiglu": (swiglu, ((6, 64),), ()),
}
"""By name: function, shapes of its tensors, and its other arguments."""


@functools.cache
def compiled(name: str, device: torch.device, backend: str = "inductor") -> Callable[..., Tensor] | None:
    """The function, to be called on tensors of `device`; None, with a warning, if it does not work there."""
    plain, shapes, others = TRIALS[name]
    fast = torch.compile(plain, backend=backend)
    try:
        differs = _difference(_dynamic(fast), plain, shapes, others, device)
    except Exception as error:  # noqa: BLE001  # whatever compiler and driver raise: training goes on without it
        logger.warning("%s is not compiled, which costs speed only: %s", name, str(error).partition("\n")[0])
        return None
    if not differs < BOUND:
        logger.warning("%s is not compiled, which costs speed only: its compiled results differ by %g", name, differs)
        return None
    return _dynamic(fast)


def _dynamic(fast: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Calls `fast` with tensors whose first dimension may have any size next time, the weights' excepted."""

    def call(x: Tensor, *others: Any) -> Tensor:
        for tensor in (x, *others):
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fast(x, *others)

    return call


def _difference(
    fast: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    shapes: tuple[tuple[int, ...], ...],
    others: tuple[float, ...],
    device: torch.device,
) -> float:
    """The largest difference of results and gradients in fp32."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    ours = with_gradients(lambda *inputs: fast(*inputs, *others), tensors)
    wanted = with_gradients(lambda *inputs: plain(*inputs, *others), tensors)
    return torch.stack([(one - other).abs().max() for one, other in zip(ours, wanted, strict=True)]).max().item()
