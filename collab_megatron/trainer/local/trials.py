"""What the trials of fast functions for GPUs compare with the plain ones: results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The result, and the gradients of the sum of its squares for each of `tensors`; fp32 on the CPU."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        out = function(*inputs)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    return [values.detach().float().cpu() for values in (out, *gradients)]
