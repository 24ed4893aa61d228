"""Check that a model can be split as the config asks, from config.json alone, before a process starts. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from collab_megatron.config.sections import ParallelSection
from collab_megatron.errors import UserError
from collab_megatron.model.spec import ModelSpec, model_spec


def check_layout(hf_config: Mapping[str, Any], parallel: ParallelSection) -> None:
    """Raise UserError, with the key to change, if the model cannot be split as `parallel` asks."""
    spec = model_spec(hf_config)
    _check_tensor(spec, parallel)
    _check_pipeline(spec, parallel)
    _check_experts(spec, parallel)
    if parallel.context > 1 and spec.sliding_window:
        raise UserError(
            f"parallel.context={parallel.context} does not work with the model's sliding_window={spec.sliding_window}: "
            "set parallel.context=1"
        )


def _check_tensor(spec: ModelSpec, parallel: ParallelSection) -> None:
    cut = {"attention heads": spec.heads, "key/value heads": spec.kv_heads}
    if not spec.experts:
        cut["MLP columns"] = spec.ffn
    for what, count in cut.items():
        if count % parallel.tensor:
            fitting = _divisors(math.gcd(*cut.values()))
            raise UserError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {count} {what}; it may be {fitting}"
            )
    if spec.experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"a mixture of experts with parallel.tensor={parallel.tensor} needs parallel.sequence_parallel=true: set it"
        )


def _check_pipeline(spec: ModelSpec, parallel: ParallelSection) -> None:
    pipeline, interleave = parallel.pipeline, parallel.interleave
    if interleave > 1 and pipeline == 1:
        raise UserError(f"parallel.interleave={interleave} needs parallel.pipeline above 1: set parallel.interleave=1")
    if spec.layers % pipeline:
        raise UserError(
            f"parallel.pipeline={pipeline} does not divide the model's {spec.layers} layers; "
            f"it may be {_divisors(spec.layers)}"
        )
    if spec.layers % (pipeline * interleave):
        raise UserError(
            f"parallel.interleave={interleave} does not divide the {spec.layers // pipeline} layers of each of "
            f"{pipeline} pipeline stages; it may be {_divisors(spec.layers // pipeline)}"
        )


def _check_experts(spec: ModelSpec, parallel: ParallelSection) -> None:
    expert, ranks = parallel.expert, parallel.tensor * parallel.context * parallel.data
    if expert > 1 and not spec.experts:
        raise UserError(f"parallel.expert={expert} needs a mixture of experts, but the model is dense: set it to 1")
    if spec.experts % expert:
        raise UserError(
            f"parallel.expert={expert} does not divide the model's {spec.experts} experts; "
            f"it may be {_divisors(math.gcd(spec.experts, ranks))}"
        )
    if ranks % expert:
        raise UserError(
            f"parallel.expert={expert} does not divide parallel.tensor * context * data = {ranks}; "
            f"it may be {_divisors(math.gcd(spec.experts or 1, ranks))}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
