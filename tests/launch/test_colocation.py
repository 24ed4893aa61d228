"""Memory of GPUs that trainer and engines share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.engine.server_args import engine_command
from collab_megatron.errors import UserError
from collab_megatron.launch.colocation import with_share
from collab_megatron.launch.config_warnings import NEAR, memory_warnings
from collab_megatron.launch.node import Node, parse_node
from collab_megatron.launch.plan import rl_plan, stages_of
from collab_megatron.model.memory import ENGINE_RESERVE, RANK_OVERHEAD
from collab_megatron.model.spec import model_spec
from tests.conftest import REPOSITORY

QWEN: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
SPEC = model_spec(QWEN)
GPU = parse_node("1x80")


def load(*overrides: str) -> RLConfig:
    sound = ("model.path=m", "data.train=a", "data.validation=b", "model.dtype=bfloat16", "parallel.device=cuda")
    colocated = ("parallel.tensor=1", "engine={placement: colocated, max_total_tokens: null}")
    return load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", [*sound, *colocated, *overrides])


def share(*overrides: str, node: Node = GPU) -> float | None:
    return with_share(load(*overrides), SPEC, node).engine.mem_fraction


def test_the_engine_gets_what_the_trainer_and_both_runtimes_leave() -> None:
    config = load()
    found = share()
    assert found is not None
    kept = max(stage.resident for stage in stages_of(config, SPEC, "cuda"))
    assert kept < max(stage.device for stage in stages_of(config, SPEC, "cuda"))  # activations are free by then
    bytes_of_all = found * 80 * 2**30 + kept + RANK_OVERHEAD + ENGINE_RESERVE + 2 * 512 * 2**20
    assert 0 <= 80 * 2**30 - bytes_of_all < 0.001 * 80 * 2**30
    more = share("algorithm.kl_coef=0")  # no reference model
    assert more is not None
    assert more > found


def test_the_server_is_started_with_it_and_the_plan_tells_it() -> None:
    config = with_share(load(), SPEC, GPU)
    argv = engine_command(config.engine, model_path="m", dtype="bfloat16", device="cuda", port=1, seed=1).argv
    assert argv[argv.index("--mem-fraction-static") + 1] == f"{config.engine.mem_fraction}"
    plan = rl_plan(config, SPEC, node=GPU, calls={"steps": (1, []), "evaluations": (0, [])})
    assert f"up to {config.engine.mem_fraction:.0%} of the memory" in plan


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.mem_fraction=0.3",),
        ("engine.placement=disaggregated",),
        ("engine.urls=[http://127.0.0.1:1]",),
        ("parallel.device=cpu",),
    ],
)
def test_elsewhere_the_config_is_left_alone(overrides: tuple[str, ...]) -> None:
    config = load(*overrides)
    assert with_share(config, SPEC, GPU) is config


def test_the_warning_counts_what_a_released_engine_keeps() -> None:
    config = load()
    peak = max(stage.device for stage in stages_of(config, SPEC, "cuda"))
    alone = replace(GPU, gpu_bytes=round(peak / NEAR) + 1)
    assert not list(memory_warnings(load("engine.placement=disaggregated"), SPEC, alone))
    (warning,) = memory_warnings(config, SPEC, alone)
    assert re.search(r"of which a colocated engine keeps about \d+\.\d GB: lower train", warning)
    large = replace(GPU, gpu_bytes=round(peak / NEAR) + ENGINE_RESERVE + 1)
    assert not list(memory_warnings(config, SPEC, large))


def test_a_gpu_that_cannot_hold_both() -> None:
    with pytest.raises(UserError, match=r"a GPU of 24\.0 GB has no .* set optimizer\.cpu_offload"):
        share(node=parse_node("1x24"))
    with pytest.raises(UserError, match=r"nvidia-smi does not report here: set engine\.mem_fraction"):
        share(node=replace(GPU, gpu_bytes=None))
