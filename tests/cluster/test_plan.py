"""What --dry-run says of layout, memory and work; nothing of it starts a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from collab_megatron.cluster import plan
from collab_megatron.cluster.cli import parse_arguments
from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import UserError
from tests.conftest import REPOSITORY

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The plan's lines for a model of eight billion parameters on GPUs, with overrides."""
    monkeypatch.setattr(plan, "gpu_bytes", lambda: None)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def lines(*overrides: str) -> list[str]:
        sound = [
            *(f"model.path={tmp_path}", "data.train=a", "data.validation=b", "model.dtype=bfloat16"),
            *("parallel.device=cuda", "parallel.tensor=1", "parallel.data=1", "rollout.max_new_tokens=1000"),
        ]
        config = load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", [*sound, *overrides])
        return plan.rl_plan(config).splitlines()

    return lines


def line(lines: list[str], start: str) -> str:
    (found,) = [text for text in lines if text.startswith(start)]
    return found


def test_one_line_for_stages_that_are_alike(planned: Callable[..., list[str]]) -> None:
    lines = planned("parallel.pipeline=4", "parallel.tensor=2", "algorithm.kl_coef=0")
    assert line(lines, "trainer").endswith("8 ranks on cuda: tensor 2 x pipeline 4")
    heading = next(number for number, text in enumerate(lines) if text.split()[:1] == ["stage"])
    assert lines[heading].split() == ["stage", "weights", "gradients", "optimizer", "activations", "working", "device"]
    stages = [text.split()[0] for text in lines[heading + 1 : heading + 5]]
    assert stages == ["0", "1", "2", "3"]  # fewer micro-batches are in flight on each
    assert lines[heading + 1].split()[1:3] == ["2.1", "GB"]
    assert "no axis divided" in line(planned(), "trainer")


def test_reference_and_offload_have_columns_where_they_hold_something(planned: Callable[..., list[str]]) -> None:
    heading = next(text for text in planned() if "stage" in text.split()[:1])
    assert heading.split()[-2:] == ["reference", "device"]
    changes = ("algorithm.reference=swap", "optimizer.cpu_offload=1.0")
    heading = next(text for text in planned(*changes) if "stage" in text.split()[:1])
    assert heading.split()[1:] == ["weights", "gradients", "activations", "working", "device", "host"]


def test_a_micro_batch_is_at_least_the_longest_sample(planned: Callable[..., list[str]]) -> None:
    lines = planned("train.micro_batch_tokens=100", "rollout.max_prompt_tokens=3000")
    assert "a micro-batch of 4,000 tokens" in line(lines, "memory")
    assert line(lines, "work").startswith("work        at most 128 micro-batches a data rank and ")


def test_room_is_told_where_a_gpu_can_be_asked(
    planned: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [text for text in planned() if text.startswith("room")]
    monkeypatch.setattr(plan, "gpu_bytes", lambda: 80 * 2**30)
    assert line(planned(), "room").startswith("room        the GPU has 80 GB: ")
    assert line(planned(), "room").endswith(" too few")
    roomy = planned("parallel.tensor=8", "optimizer.distributed=true")
    assert line(roomy, "room").endswith(" to spare")


def test_the_engine_says_what_a_token_costs(planned: Callable[..., list[str]]) -> None:
    told = line(planned("engine.max_total_tokens=100000"), "engine")
    assert told.endswith("per rank weights 15 GB, KV cache 12 GB (100,000 tokens, 128 kB a token)")
    told = line(planned("engine.max_total_tokens=null", "engine.mem_fraction=0.8"), "engine")
    assert told.endswith("KV cache 128 kB a token, up to 80% of the memory with the weights")


def test_servers_and_what_a_sync_sends_them(planned: Callable[..., list[str]]) -> None:
    lines = planned("engine.count=3", "engine.tensor=2")
    assert line(lines, "engine").startswith(
        "engine      3 SGLang servers at tensor parallel 2, disaggregated; per rank "
    )
    assert line(lines, "sync") == "sync        broadcast, 15 GB per update to 3 servers, in buckets of at most 512 MB"
    assert "1 SGLang server at tensor parallel 1, colocated" in line(planned("engine.placement=colocated"), "engine")
    assert line(planned("engine.placement=colocated"), "sync").startswith(
        "sync        ipc, 15 GB per update to 1 server,"
    )
    lines = planned("engine.urls=[http://a:1, http://b:2]", "sync.transport=disk")
    assert line(lines, "engine") == "engine      the SGLang servers at http://a:1, http://b:2, disaggregated"
    assert line(lines, "sync") == "sync        disk, 15 GB per update to 2 servers"


def test_how_far_sampling_runs_ahead_and_where_the_money_ends(planned: Callable[..., list[str]]) -> None:
    lines = planned(
        "driver={max_staleness: 1, oversample_prompts: 4, shards: 2}", "budget={soft_usd: 10, hard_usd: 20}"
    )
    assert "driver      2 processes, at most 20 trees under way: tokens at most 1 update old" in lines
    assert "budget      warns at $10.00, stops at $20.00" in lines
    lines = planned()
    assert "driver      1 process, at most 16 trees under way: strictly on-policy" in lines
    assert "budget      none (budget.hard_usd)" in lines


def test_a_placement_that_cannot_be_is_refused(planned: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=r"engine\.placement=colocated .* set engine\.count to 4"):
        planned("engine.placement=colocated", "parallel.tensor=4")


def test_a_layout_that_does_not_fit_is_refused(planned: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=r"parallel\.pipeline=5 does not divide"):
        planned("parallel.pipeline=5")


def test_overrides_may_stand_on_either_side_of_an_option() -> None:
    found = parse_arguments("", ["a.yaml", "x.y=1", "--dry-run", "x.z=2"])
    assert (found.overrides, found.dry_run) == (["x.y=1", "x.z=2"], True)
