"""Every config of the paper's tasks passes --dry-run for a node of eight GPUs, with stand-ins for the models and data
that only the hub has; and it holds the paper's figures."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collab_megatron.config import BuildDatasetConfig, DPOConfig, EvaluateConfig, RLConfig, SFTConfig, load_config
from collab_megatron.data.parquet import Conversation, Pair, write_conversations, write_pairs, write_tasks
from collab_megatron.errors import EXIT_USER, UserError
from collab_megatron.rollout.llm.templates import load_template
from collab_megatron.rollout.sandbox.sandbox import interpreter, isolation
from collab_megatron.types import Message
from tests.config.table import run_here
from tests.conftest import REPOSITORY
from tests.data_engine.test_problems import ARTICLES, CODE, MATH
from tests.launch.full_size_models import LLAMA_31_8B, QWEN_25_7B, write_full_size
from tests.rollout.fakes import TASK

pytestmark = pytest.mark.slow

CONF = REPOSITORY / "conf"
TASKS = {
    "math_hard": ("accuracy", 5e-4, MATH),
    "medium": ("bleu_score", 1e-4, ARTICLES),
    "bigcodebench": ("pass_rate", 5e-4, CODE),
}
ASKED = (Message("user", "a table"),)
GOOD, BAD = (Message("assistant", "which day?"),), (Message("assistant", "BOOK"),)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Models and data."""
    folder = tmp_path_factory.mktemp("paper")
    write_full_size(folder / "llama", LLAMA_31_8B, tiny_model)
    write_full_size(folder / "qwen", QWEN_25_7B, tiny_model)
    write_tasks(folder / "rl_train.parquet", [replace(TASK, task_id=f"t{n}", prompt=ASKED) for n in range(16)])
    held_out = replace(TASK, task_id="held", prompt=ASKED, single_turn_prompt="another one")
    write_tasks(folder / "rl_validation.parquet", [held_out])
    for part in ("train", "validation"):
        chats = [Conversation(f"{part} {n}", (*ASKED, *GOOD)) for n in range(64)]
        write_conversations(folder / f"sft_{part}.parquet", chats)
        write_pairs(folder / f"dpo_{part}.parquet", [Pair(f"{part} {n}", ASKED, GOOD, BAD) for n in range(64)])
    for task, (_, _, rows) in TASKS.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{task}.parquet")
    return folder


SANDBOX = "reward.settings.pass_rate.sandbox"


def dry_run(program: str, config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What the plan says of the file as it is shipped. A build is of this machine: where it scores with a sandbox that
    cannot be had here, it is refused in one sentence, and the plan is that of `sandbox: unsafe`."""
    scores = program == "build" and "bigcodebench" in str(config)
    said = run_here(program, [str(config), "--dry-run", *overrides], capsys)
    if scores and not can_isolate():
        assert said.code == EXIT_USER, said.err
        (sentence,) = said.sentences
        assert "cannot be isolated on this machine" in sentence
        assert f"set {SANDBOX}=unsafe" in sentence
        said = run_here(program, [str(config), "--dry-run", *overrides, f"{SANDBOX}=unsafe"], capsys)
    assert said.code == 0, said.err
    return said.out


def can_isolate() -> bool:
    try:
        isolation(*interpreter(Path(sys.executable)), SANDBOX)
    except UserError:
        return False
    return True


def stand_ins(world: Path, kind: str, model: str) -> list[str]:
    files = [f"data.{part}={world / f'{kind}_{part}.parquet'}" for part in ("train", "validation")]
    return ["--gpus", "8x80", *files, f"model.path={world / model}", f"run.dir={world / 'runs'}"]


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # where the configs' prompt files are found
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "none")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("program", "name", "kind", "model"),
    [
        ("train_rl", "{}.yaml", "rl", "llama"),
        ("evaluate", "{}.yaml", "rl", "llama"),
        ("train_sft", "{}/sft.yaml", "sft", "llama"),
        ("train_dpo", "{}/dpo.yaml", "dpo", "llama"),
        ("train_rl", "{}/qwen_rl.yaml", "rl", "qwen"),
        ("train_sft", "{}/qwen_sft.yaml", "sft", "qwen"),
        ("train_dpo", "{}/qwen_dpo.yaml", "dpo", "qwen"),
        ("evaluate", "{}/qwen_rl.yaml", "rl", "qwen"),
    ],
)
def test_a_task_trains(
    program: str, name: str, kind: str, model: str, task: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = dry_run(program, CONF / name.format(task), capsys, *stand_ins(world, kind, model))
    if program != "evaluate":
        assert re.search(r"ranks on cuda .*tensor 4", out), out[-3000:]
        assert "does not fit" not in out


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("name", "model"), [("evaluate", "llama"), ("qwen_evaluate", "qwen")])
def test_a_task_has_a_table_of_models(
    name: str, model: str, task: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("base", "base+proactive", "sft", "dpo", "rl")
    paths = [f"models.{row}.path={world / model}" for row in names]
    own = [*stand_ins(world, "rl", model), *paths]
    out = dry_run("evaluate", CONF / task / f"{name}.yaml", capsys, *own)
    assert f"models      {', '.join(names)}" in out
    assert "users       simulators.user, terse" in out
    assert out.count("parameters, bfloat16") == 1  # all have the same stand-in
    fewer = dry_run("evaluate", CONF / task / f"{name}.yaml", capsys, *own, "--models", "rl", "base")
    assert "models      rl, base\n" in fewer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["evaluate", "qwen_evaluate"])
def test_a_table_is_like_the_papers(task: str, name: str) -> None:
    """Whole conversations from the user's own opening, a judge of the chat alone, a user that training has not seen."""
    table: Any = load_config(EvaluateConfig, CONF / task / f"{name}.yaml")
    assert list(table.models) == ["base", "base+proactive", "sft", "dpo", "rl"]
    assert table.compare.baseline == "base"
    assert table.evaluation.simulated_opening
    assert table.reward.interactivity_sees == "chat"
    training: Any = load_config(RLConfig, CONF / f"{task}.yaml")
    assert table.reward.metric_weights == training.reward.metric_weights
    assert training.evaluation.simulated_opening
    terse = table.evaluation.users["terse"]
    trained_with = {training.simulators.user.model, *(user.model for user in training.simulators.user.mixture)}
    assert terse.model not in trained_with
    load_template("user", terse.prompt_file, required=("request", "chat", "task_desc", "termination_signal"))
    with pytest.raises(UserError, match=r"'sftt' is not one of models \(base, base\+proactive, sft, dpo, rl\)"):
        load_config(EvaluateConfig, CONF / task / f"{name}.yaml", models=["sftt"])


@pytest.mark.parametrize("task", TASKS)
def test_a_task_builds_its_conversations(task: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"problems={world / f'{task}.parquet'}", "problems_split=[]", f"tokenizer={world / 'llama'}"]
    out = dry_run("build", CONF / task / "data.yaml", capsys, *overrides, f"output={world / 'built'}")
    assert "3 candidates (1 proactive) x 3 futures" in out
    assert "of at most 7 assistant turns" in out


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_the_figures_of_the_paper(task: str) -> None:
    metric, penalty, _ = TASKS[task]
    weights = {metric: 1.0, "interactivity": 1.0, "token_amount": -1000 * penalty}
    rl: Any = load_config(RLConfig, CONF / f"{task}.yaml")
    assert rl.reward.metric_weights == weights
    assert (rl.rollout.max_user_turns, rl.rollout.num_repeat_rollouts, rl.optimizer.lr) == (2, 3, 2e-6)
    assert rl.simulators.user.model == "gpt-4o-mini"
    qwen: Any = load_config(RLConfig, CONF / task / "qwen_rl.yaml")
    assert (qwen.optimizer.lr, qwen.rollout.num_replies, qwen.rollout.prompts_per_step) == (1e-6, 8, 16)
    assert load_config(BuildDatasetConfig, CONF / task / "data.yaml").reward.metric_weights == weights
    sft, dpo = load_config(SFTConfig, CONF / task / "sft.yaml"), load_config(DPOConfig, CONF / task / "dpo.yaml")
    assert (sft.optimizer.lr, dpo.optimizer.lr) == (1e-5, 5e-6)
    assert sft.model.path == "meta-llama/Llama-3.1-8B-Instruct"
    assert load_config(SFTConfig, CONF / task / "qwen_sft.yaml").model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert {rl.model.path, dpo.model.path} == {str(sft.export_hf)}
