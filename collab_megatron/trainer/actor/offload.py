"""AdamW with CPU offload: a share of the fp32 master weights, of both moments and of the step is on the host.

Megatron's optimizer of this kind (HybridDeviceOptimizer, 0.16.1) rejects parameters that are not on a GPU, works with
the distributed optimizer only, and otherwise keeps a second master copy on the device. This one replaces the optimizer
inside megatron's, of whatever kind, and leaves gradients, their norm and clipping on the device.

Traffic of a step per offloaded weight: the gradient to the host (4 bytes; the next copy overlaps the arithmetic), the
weight to the device (4 bytes; with fp32 weights, which stay on the device, also to the host).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_HOST = torch.device("cpu")


class HostMaster(Tensor):
    """A master weight on the host whose gradient may be on the device, where norm and clipping need it.

    torch refuses such a gradient for a plain tensor. `to_host` changes a plain one in place, because megatron holds it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _device_grad: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:
        return self._device_grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._device_grad = value


def to_host(master: Tensor) -> None:
    """Move a master weight to the host (pinned if it was on a GPU), in place."""
    assert type(master) is Tensor, f"{type(master)} is not a plain tensor"
    master.data = _pinned_like(master, master.is_cuda).copy_(master.data)
    master.__class__ = HostMaster


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW over `groups`; a `share` (0..1, by number of weights) of them is stepped on the host.

    groups: the parameter groups of the replaced optimizer; the dicts are shared with it. masters: the tensors among
    them that are master weights and not the model's own. Parameters are chosen from the largest down, up to the share.
    """

    def __init__(self, groups: list[dict[str, Any]], masters: list[Tensor], share: float) -> None:
        super().__init__([torch.empty(0)], fused=True)
        # not through the constructor, which refuses views, as the distributed optimizer's fp32 shards are
        self.param_groups = groups
        apart = {id(master) for master in masters}
        self._on_host = {id(parameter) for parameter in _largest(self._parameters(), share)}
        for parameter in self._parameters():
            if self.is_on_host(parameter) and id(parameter) in apart:
                to_host(parameter)

    @property
    def host_numel(self) -> int:
        """Weights that are stepped on the host."""
        return sum(p.numel() for p in self._parameters() if self.is_on_host(p))

    def is_on_host(self, parameter: Tensor) -> bool:
        """Whether its moments, and its master weight if it has one, are on the host."""
        return id(parameter) in self._on_host

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step over every parameter that has a gradient; returns when the host's part is done."""
        assert closure is None, "a closure is not supported"
        waiting: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            here = []
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    if self.is_on_host(parameter):
                        waiting.append((parameter, group))
                    else:
                        here.append(parameter)
            self._update(group, here, here, [p.grad for p in here])
        for parameter, group, grad in _gradients_on_host(waiting):
            # a copy even if the device is the host: one path for all
            own = isinstance(parameter, HostMaster)
            weight = parameter if own else _pinned_like(parameter, parameter.is_cuda).copy_(parameter)
            self._update(group, [parameter], [weight], [grad])
            if not own:
                parameter.copy_(weight)

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], weights: list[Tensor], grads: list[Tensor]
    ) -> None:
        """AdamW in place on `weights`, which are `parameters` or copies of them, on one device with their moments."""
        states = [self._state(parameter, weight) for parameter, weight in zip(parameters, weights, strict=True)]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, parameter: Tensor, weight: Tensor) -> dict[str, Any]:
        """The parameter's state, moved to the weight's device: loading puts it on the parameter's."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        for name, value in state.items():
            state[name] = value.to(weight.device)
        return state

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]


def _largest(parameters: Iterator[Tensor], share: float) -> list[Tensor]:
    """As many parameters, from the largest down, as fit into the share of all weights."""
    by_size = sorted(parameters, key=lambda p: -p.numel())
    room = share * sum(p.numel() for p in by_size)
    chosen = []
    for parameter in by_size:
        if parameter.numel() <= room:
            chosen.append(parameter)
            room -= parameter.numel()
    return chosen


def _gradients_on_host(
    waiting: list[tuple[Tensor, dict[str, Any]]],
) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
    """(parameter, group, gradient on the host), while the copy of the next gradient is running.

    There are two buffers, so a gradient is valid until the one after the next is requested.
    """
    if not waiting:
        return
    most, first = max(p.numel() for p, _ in waiting), waiting[0][0].grad
    assert first is not None
    buffers = [_pinned_like(torch.empty(most, device="meta"), first.is_cuda) for _ in range(2)]

    def start(number: int) -> tuple[Tensor, Any]:
        grad = waiting[number][0].grad
        assert grad is not None
        there = buffers[number % 2][: grad.numel()].view(grad.shape)
        there.copy_(grad, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return there, done

    under_way = start(0)
    for number, (parameter, group) in enumerate(waiting):
        grad, done = under_way
        done.synchronize()
        if number + 1 < len(waiting):
            under_way = start(number + 1)
        yield parameter, group, grad


def _pinned_like(like: Tensor, pinned: bool) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device=_HOST, pin_memory=pinned)
