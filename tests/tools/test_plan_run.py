"""tools/plan_run.py: the plans that docs/layouts.md states, errors, and the prediction for this machine."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from collab_megatron.config import RLConfig, load_config
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.parquet import write_tasks
from collab_megatron.errors import UserError
from collab_megatron.launch.hosts import equal_hosts
from collab_megatron.launch.placement import place
from collab_megatron.launch.step_time import Assumed, step_time
from collab_megatron.model.folder import read_hf_config
from collab_megatron.model.spec import model_spec
from collab_megatron.types import Message, Task
from tests.conftest import REPOSITORY, Server
from tools.bench.grpo_step import SHAPES, make_model, make_prompts, our_config, run_ours
from tools.plan_run import main, measure_cpu

STATED = {"qwen2.5_7b": ("Qwen2.5-7B", 1), "llama3.1_70b": ("Llama-3.1-70B", 16), "qwen3_235b": ("Qwen3-235B-A22B", 64)}
DOCUMENT = REPOSITORY / "docs" / "layouts.md"


def command(name: str, *more: str) -> list[str]:
    plans = REPOSITORY / "conf" / "plan"
    own = ("--prompt-tokens", "2048", *(() if "--gpus" in more else ("--gpus", "8x80")))
    return [str(plans / f"{name}_rl.yaml"), "--shape", str(plans / f"{name}.json"), *own, *more]


def figures(name: str, folder: Path, *more: str) -> dict[str, Any]:
    main(command(name, "--json", str(folder / "plan.json"), *more))
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return found


@pytest.mark.parametrize("name", list(STATED))
@pytest.mark.slow
def test_the_stated_plans_are_those_of_the_tool(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    title, nodes = STATED[name]
    plan = figures(name, tmp_path, "--nodes", str(nodes))
    said = capsys.readouterr().out
    assert plan["gpus"] == 8 * nodes
    assert plan["fits"]
    assert plan["step_s"] == pytest.approx(sum(plan["phases"].values()))
    assert "assumed     2,048 tokens of prompt" in said
    assert f"nodes       {nodes} node" in said
    phases = " | ".join(f"{seconds:,.0f}" for seconds in plan["phases"].values())
    row = f"| {title} | {8 * nodes} | {plan['step_s']:,.0f} | {phases} | {plan['hours']:.1f} | {plan['gpu_usd']:,.0f} |"
    assert row in DOCUMENT.read_text()


def test_a_layout_that_does_not_fit_is_refused_and_memory_that_does_not_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"do not fit: 8 nodes have 64 GPUs.*ask for 16 nodes"):
        main(command("llama3.1_70b", "--nodes", "8"))
    assert not figures("llama3.1_70b", tmp_path, "--nodes", "16", "--gpus", "8x40")["fits"]
    assert "does not fit, so the times below are of no use" in capsys.readouterr().out


def test_named_nodes_and_prices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap = figures("qwen2.5_7b", tmp_path, "--hosts", "gpu[01-02]:4", "--gpu-usd", "1")
    assert "gpu02  4 GPUs  engine 0 to 1" in capsys.readouterr().out
    assert cheap["gpu_usd"] == pytest.approx(8 * cheap["hours"])
    short = figures("qwen2.5_7b", tmp_path, "--hosts", "gpu[01-02]:4", "--reply-share", "0.1")
    assert short["phases"]["update"] < cheap["phases"]["update"]


@pytest.mark.parametrize(
    "more, says",
    [
        (("--device", "V100"), "--device V100"),
        (("--reply-share", "0"), "--reply-share"),
        (("--gpu-usd=-1",), "--gpu-usd -1"),
        (("--nodes", "0"), "--nodes 0"),
        (("--nodes", "1", "--hosts", "a:8"), "--nodes and --hosts"),
        (("--shape", "absent.json"), "--shape absent.json"),
    ],
)
def test_a_bad_option_is_one_sentence(more: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        main(command("qwen2.5_7b", *more))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(SHAPES))
def test_a_step_of_this_machine_is_predicted_within_30_percent(name: str, tmp_path: Path, desk: Server) -> None:
    """Needs an idle machine. The work of tools/bench/grpo_step.py: the demo's model, and SmolLM2-135M."""
    shape, model, data = SHAPES[name], tmp_path / "model", tmp_path / "train.parquet"
    make_model(name, model)
    prompts = make_prompts(shape, shape.steps)
    write_tasks(data, [Task(f"{i}", (Message("user", text),), text, "unused") for i, text in enumerate(prompts)])
    file = tmp_path / "planned.yaml"
    file.write_text(yaml.safe_dump(our_config(shape, model, data, tmp_path / "run", shape.steps)))
    config, chat = load_config(RLConfig, file), ChatTemplate(load_tokenizer(model))
    prompt_tokens = statistics.mean(len(chat.prompt_ids([Message("user", text)])) for text in prompts)
    placement = place(equal_hosts(1, 0), config.parallel, config.engine, device="cpu", shards=1)
    predicted = step_time(
        config,
        model_spec(read_hf_config(model)),
        measure_cpu(),
        placement,
        Assumed(prompt_tokens=prompt_tokens, reply_share=1.0),  # the bench's replies all have the largest length
    )
    measured = statistics.median(run_ours(shape, model, data, tmp_path, shape.steps, desk.url, ()))
    assert predicted.step_s == pytest.approx(measured, rel=0.3), predicted.phases
