"""Which of the bugs that local/cpu_support.py and policy_model.py work around the installed Megatron-Core has.

One table for both versions. Where a test fails, upstream has changed: correct the table, and remove the workaround once
no supported version has the bug. `PYTHONPATH=FOLDER_OF_ANOTHER_WHEEL` runs the tests against another version.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import collab_megatron.trainer.actor  # before megatron: makes it importable without CUDA  # noqa: F401  # isort: skip

import megatron.core
import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.moe import moe_utils

STEP_NOT_RESTORED = "A: restoring a parameter's Adam state asks for a step that checkpoints do not have"
STEP_SHARED = "B: after a load all parameters share one step tensor"
NO_STATE = "C: the state of an optimizer that has not stepped cannot be described"
NO_GEMM = "D: the router's matmul has no name without transformer-engine"
NO_NUMPY = "D: the token dispatcher gets no numpy arrays from tensors on the CPU"
EXPERTS_NOT_SUMMED = "without expert parallelism, experts' gradients are not summed over tensor-parallel ranks"

FIXED = {
    "0.16.1": set[str](),
    "0.19.2": {NO_GEMM, EXPERTS_NOT_SUMMED},
}
"""Version of megatron-core: which of the bugs it has no more."""

VERSION = str(megatron.core.__version__)
WITH_FUSED_ADAM = bool(distrib_optimizer.HAVE_APEX_OR_TE)
torch_adamw = pytest.mark.skipif(WITH_FUSED_ADAM, reason="megatron uses a fused Adam here, which none of this concerns")


def has_bug(bug: str) -> bool:
    assert VERSION in FIXED, f"megatron-core {VERSION} is not in the table of {__file__}: find out what it fixes"
    return bug not in FIXED[VERSION]


def upstream(name: str) -> Any:
    """A method of megatron's DistributedOptimizer without our patch."""
    method = getattr(distrib_optimizer.DistributedOptimizer, name)
    return getattr(method, "__wrapped__", method)


def stepped(count: int = 2, steps: int = 3) -> torch.optim.AdamW:
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(count)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.ones(4)
        optimizer.step()
    return optimizer


def in_megatron(optimizer: torch.optim.Optimizer) -> SimpleNamespace:
    """What DistributedOptimizer's methods read from self."""
    weights = optimizer.param_groups[0]["params"]
    return SimpleNamespace(
        optimizer=optimizer,
        grad_scaler=None,
        gbuf_ranges=[],
        ddp_config=SimpleNamespace(use_megatron_fsdp=False),
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, fp16=False),
        model_param_group_index_map={weight: (0, place) for place, weight in enumerate(weights)},
    )


@torch_adamw
def test_a_restored_state_needs_a_step() -> None:
    optimizer = stepped()
    weight = optimizer.param_groups[0]["params"][0]
    saved = {"param": torch.zeros(4), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    try:
        with torch.no_grad():
            upstream("_set_main_param_and_optimizer_states")(in_megatron(optimizer), weight, saved)
        found = False
    except KeyError as error:
        assert error.args == ("step",)  # noqa: PT017  (no error is an answer too)
        found = True
    assert found == has_bug(STEP_NOT_RESTORED)


@torch_adamw
def test_a_loaded_step_is_shared() -> None:
    optimizer = stepped()
    (group,) = optimizer.param_groups
    group.update(dict.fromkeys(distrib_optimizer.param_group_identifier_keys, 1.0))
    saved = {"optimizer": {"param_groups": [{**group, "step": 3.0}]}}
    upstream("load_state_dict")(in_megatron(optimizer), saved)
    first, second = (optimizer.state[weight]["step"] for weight in optimizer.param_groups[0]["params"])
    assert (first.data_ptr() == second.data_ptr()) == has_bug(STEP_SHARED)


@torch_adamw
def test_an_optimizer_before_its_first_step_cannot_be_described() -> None:
    try:
        upstream("state_dict")(in_megatron(stepped(steps=0)))
        found = False
    except AssertionError:
        found = True
    assert found == has_bug(NO_STATE)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="not without transformer-engine")
def test_the_router_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a second copy of the module, which nothing has patched."""
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # cannot be imported
    spec = moe_utils.__spec__
    assert spec is not None
    assert spec.origin is not None
    name = f"{moe_utils.__package__}.moe_utils_unpatched"
    copy_spec = importlib.util.spec_from_file_location(name, spec.origin)
    assert copy_spec is not None
    assert copy_spec.loader is not None
    copy = importlib.util.module_from_spec(copy_spec)
    sys.modules[name] = copy
    try:
        copy_spec.loader.exec_module(copy)
    finally:
        del sys.modules[name]
    assert (not hasattr(copy, "te_general_gemm")) == has_bug(NO_GEMM)


def test_the_dispatchers_arrays_on_a_cpu() -> None:
    given = moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)
    assert torch.is_tensor(given) == has_bug(NO_NUMPY)


def test_gradients_of_experts_that_tensor_parallel_ranks_share() -> None:
    """A whole expert on each of two tensor-parallel ranks. `allreduce` false: reduced over the experts' own group."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    layer = ColumnParallelLinear(
        4, 4, config=config, init_method=torch.nn.init.zeros_, bias=False, is_expert=True, tp_group=alone
    )
    assert layer.weight.allreduce == has_bug(EXPERTS_NOT_SUMMED)
