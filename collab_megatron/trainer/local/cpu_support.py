"""Patches that let Megatron-Core 0.16 run without CUDA, and with torch's own AdamW.

Megatron has the device "cuda" in literals and asks torch.cuda for devices, streams and random states. `install` answers
on a machine without CUDA, and does nothing on one with it: the device is the CPU, streams and events do nothing, the
CUDA generator is the CPU generator. Three patches (A, B, C) fix what upstream does not do for torch's AdamW, its
fallback without transformer-engine and apex; they are needed on a GPU too. A fourth (D) lets a mixture of experts run
without transformer-engine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor zeros ones empty full arange rand randn randint zeros_like ones_like empty_like full_like as_tensor"
)


class _Stream:
    """Stand-in for torch.cuda.Stream: a real class, because libraries use it in annotations."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Event:
    """Stand-in for torch.cuda.Event: everything it could wait for is already done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@functools.cache
def install() -> bool:
    """Make megatron importable and usable; returns whether anything was patched. Call it before importing megatron."""
    if torch.cuda.is_available():
        return False
    _runtime()
    _factories()
    _tensor_type_names()
    # before any other megatron module, all of which use its decorator; torch.compile would need a C++ compiler
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()
    _random_states()
    return True


def _runtime() -> None:
    """torch.cuda's functions for device, streams and memory."""

    def answer(value: Any = None) -> Callable[..., Any]:
        return lambda *_, **__: value

    cuda: Any = torch.cuda
    cuda.current_device = answer(_CPU)  # megatron only ever uses it as device=...
    cuda.current_stream = cuda.default_stream = answer(_Stream())
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.Stream, cuda.Event = _Stream, _Event
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, answer())


def _random_states() -> None:
    """The CUDA generator is the CPU generator, also for megatron's tracker of random states."""
    import megatron.core.tensor_parallel.random as tracker

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.random.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.random.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = set_state
    cuda.manual_seed = lambda seed: torch.random.default_generator.manual_seed(int(seed))
    setattr(tracker, "_get_cuda_rng_state", get_state)  # noqa: B010  (private names that mypy does not know)
    setattr(tracker, "_set_cuda_rng_state", set_state)  # noqa: B010
    # upstream warns at every fork, but here both states are the same
    logging.getLogger(tracker.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _factories() -> None:
    """device="cuda" in a literal means the CPU."""

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def made(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs and _names_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return made

    # `with torch.device(...)` (in transformers' from_pretrained) knows factories by identity and looks them up once:
    # show it the originals, which the wrapped ones call
    torch.utils._device._device_constructors()
    for name in _FACTORIES.split():
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    plain_to = tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return plain_to(self, *args, **kwargs)

    tensor.to = to
    tensor.cuda = lambda self, *_, **__: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_, **__: self


def _tensor_type_names() -> None:
    """Megatron's optimizer tells parameters apart by Tensor.type() strings such as "torch.cuda.FloatTensor"."""
    tensor: Any = torch.Tensor
    plain_type = tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        if not isinstance(answer, str) or answer.startswith("torch.cuda."):
            return answer
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return answer.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else answer

    tensor.type = type_


@functools.cache
def patch_experts() -> None:
    """D: megatron's mixture of experts without transformer-engine and on a CPU.

    The router falls back to torch's matmul if transformer-engine's is None, but without transformer-engine its name is
    missing; and the dispatcher needs numpy arrays, which it makes of CUDA tensors only.
    """
    import megatron.core.transformer.moe.moe_utils as moe
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    if not hasattr(moe, "te_general_gemm"):
        setattr(moe, "te_general_gemm", None)  # noqa: B010
    if torch.cuda.is_available():
        return

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    setattr(dispatcher, "maybe_move_tensor_to_cpu", on_host)  # noqa: B010


@functools.cache
def patch_torch_adamw() -> None:
    """A and B: DistributedOptimizer with torch's AdamW, which keeps a `step` tensor per parameter.

    A: setting a parameter's restored state would drop or overwrite `step`; the one already restored is kept.
    B: after loading, all parameters share one `step` tensor, which AdamW then increments once per parameter: training
       diverges without an error. Each parameter gets its own. Upstream: optimizer/distrib_optimizer.py (0.16.1).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer_class: Any = DistributedOptimizer
    plain_set = optimizer_class._set_main_param_and_optimizer_states
    plain_load = optimizer_class.load_state_dict

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            tensors = {**tensors, "step": state["step"]}
        return plain_set(self, model_param, tensors)

    def load_state_dict(self: Any, state_dict: Any) -> Any:
        result = plain_load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        return result

    optimizer_class._set_main_param_and_optimizer_states = set_states
    optimizer_class.load_state_dict = load_state_dict


def create_empty_adam_state(optimizer: Any) -> None:
    """C: give every parameter of a megatron optimizer the Adam state that torch's AdamW would create on its first step.

    Upstream builds the state dict to load into from this state and, without it, asserts or leaves `step` out.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if parameter.numel() and not state:
                    # as torch's AdamW does (torch 2.13, optim/adamw.py and adam.py, _init_group): the fused kernel
                    # refuses a step on another device than the parameter
                    on_device = group.get("fused") or group.get("capturable")
                    step_device = parameter.device if on_device else torch.device("cpu")
                    state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
