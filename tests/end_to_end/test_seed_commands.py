"""The commands of verl's CollabLLM documentation have an equal each: docs/data.md lists the two side by side, and ours
are run from there, word for word, in one folder after each other.

The hub's datasets are rows of our own in the same columns. SFT trains the demo's model on the CPU, and RL makes the
checks of a start with a stand-in for Qwen2.5-7B on a node of eight GPUs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from collab_megatron.config import RLConfig, SFTConfig, load_config
from collab_megatron.data.parquet import read_conversations, read_tasks
from collab_megatron.data.prepare import collaborative_prompt
from tests.config.table import Said, run_here
from tests.conftest import REPOSITORY
from tests.data.test_datasets import flat, turn
from tests.launch.full_size_models import QWEN_25_7B, write_full_size

pytestmark = pytest.mark.slow

DOCUMENT = REPOSITORY / "docs" / "data.md"
ROW = re.compile(r"^\| `([^`|]+)` \| `(python [^`|]+)` \|$", re.MULTILINE)
HUB = tuple(
    f"collabllm/collabllm-multiturn-{task}{size}"
    for task in ("math-hard", "medium", "bigcodebench")
    for size in ("", "-large")
)
CONVERSATIONS = 60
SFT_ON_THE_CPU = (
    *("model.dtype=float32", "parallel={device: cpu}", "max_tokens=1024", "batch_size=4"),
    *("train.epochs=null", "train.steps=2", "train.recompute=none", "train.micro_batch_tokens=1024"),
)
WORDS = {"interactivity": 1.0, "token_amount": -0.0001}


def commands() -> dict[str, list[str]]:
    """verl's command in the table -> the arguments of ours, after `python`."""
    return {theirs: shlex.split(ours)[1:] for theirs, ours in ROW.findall(DOCUMENT.read_text("utf-8"))}


def ours(*theirs: str) -> list[str]:
    """Our equal of the one command of verl's in which these words are."""
    (argv,) = (argv for command, argv in commands().items() if all(word in command for word in theirs))
    return argv


def rows(name: str) -> list[dict[str, Any]]:
    """A dataset of the hub: two turns of two candidates in every conversation."""
    later: tuple[list[dict[str, str]], ...] = ([], [turn("assistant", "which day?"), turn("user", "monday")])
    return [
        flat(conv, number, f"reply {score}", float(score), prompt=[turn("user", f"{name} {conv}"), *chat])
        for conv in range(CONVERSATIONS)
        for number, chat in enumerate(later)
        for score in (0, 1)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder like that of the repository, with shipped configs and no runs, and the stand-in model."""
    folder = tmp_path_factory.mktemp("seed")
    (folder / "conf").symlink_to(REPOSITORY / "conf")
    write_full_size(folder / "qwen", QWEN_25_7B, tiny_model)
    return folder


@pytest.fixture(autouse=True)
def _in_the_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' relative paths are below it, the hub has its datasets, and the API keys are there."""
    monkeypatch.chdir(place)

    def load_dataset(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        assert (name in HUB, subset, split) == (True, None, "train")
        return datasets.Dataset.from_list(rows(name))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "none")


def load_config_of(kind: Any, argv: list[str]) -> Any:
    """The config that a training command reads."""
    return load_config(kind, Path(argv[2]), argv[3:])


def in_this_process(argv: list[str], capsys: pytest.CaptureFixture[str], *more: str) -> Said:
    programs = {"tools/prepare_dataset.py": "prepare", "collab_megatron.train_rl": "train_rl"}
    words = argv[1:] if argv[0] == "-m" else argv
    said = run_here(programs[words[0]], [*words[1:], *more], capsys)
    assert said.code == 0, said.err[-3000:]
    return said


def prepared(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder that our command names, filled."""
    argv = ours("process_dataset.py", f"--dataset {name} ", f"--dataset_type {kind}")
    in_this_process(argv, capsys)
    folder = Path(argv[argv.index("--output") + 1])
    assert not folder.is_absolute()
    return folder


def test_every_dataset_of_the_hub_and_every_training_has_a_row() -> None:
    found = list(commands())
    for name in HUB:
        assert sum(f"--dataset {name} " in command for command in found) == (2 if name.endswith("-large") else 0)
    assert sum("train_sft_collabllm.sh" in command for command in found) == 1
    assert sum("train_rl_collabllm.sh" in command for command in found) == 2
    assert len(found) == 9


@pytest.mark.parametrize("name", [name for name in HUB if name.endswith("-large")])
def test_process_dataset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One system prompt, each history once, of each conversation the best last reply; a tenth is held out."""
    folder = prepared("rl", name, capsys)
    assert prepared("sft", name, capsys) == folder
    tasks = [task for part in ("train", "validation") for task in read_tasks(folder / f"rl_{part}.parquet")]
    assert len(tasks) == CONVERSATIONS * 2
    assert {task.prompt[0].content for task in tasks} == {collaborative_prompt()}
    assert {task.ground_truth for task in tasks} == {f"answer {conv}" for conv in range(CONVERSATIONS)}
    assert all(task.task_desc for task in tasks)
    parts = [read_conversations(folder / f"sft_{part}.parquet") for part in ("train", "validation")]
    assert [bool(part) for part in parts] == [True, True]
    chats = [chat.messages for part in parts for chat in part]
    assert len(chats) == CONVERSATIONS
    assert {(chat[0].content, len(chat), chat[-1].content) for chat in chats} == {
        (collaborative_prompt(), 5, "reply 1")
    }


def test_a_smaller_dataset_takes_the_place_of_the_large_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name in HUB[::2]:
        for kind in ("rl", "sft"):
            argv = [
                word.removesuffix("-large") if word.startswith("collabllm/") else word
                for word in ours(f"--dataset {name}-large ", f"--dataset_type {kind}")
            ]
            assert name in argv
            in_this_process(argv, capsys)


def test_train_sft(place: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared("sft", "collabllm/collabllm-multiturn-math-hard-large", capsys)
    argv = ours("train_sft_collabllm.sh")
    config = load_config_of(SFTConfig, argv)
    assert Path(config.data.train_files[0]).parent == folder
    assert (config.model.path, config.optimizer.lr) == ("Qwen/Qwen2.5-7B-Instruct", 1e-6)
    assert (config.batch_size, config.train.epochs) == (64, 3)
    done = subprocess.run(
        [sys.executable, *argv, f"model.path={tiny_model}", *SFT_ON_THE_CPU],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "sft 2/2" in done.stdout
    assert (place / config.export_hf / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("task", "metric", "weights"),
    [("math-hard", "accuracy", {"accuracy": 1.0, **WORDS}), ("medium", "bleu_score", {"bleu_score": 1.0, **WORDS})],
)
def test_train_rl(
    task: str, metric: str, weights: dict[str, float], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed's weights, in the recipe's unit, pass every check of a start without a warning of the metrics."""
    folder = prepared("rl", f"collabllm/collabllm-multiturn-{task}-large", capsys)
    argv = ours("train_rl_collabllm.sh", f"metric_weights.{metric}=1")
    config = load_config_of(RLConfig, argv)
    assert config.reward.metric_weights == weights
    assert Path(config.data.train_files[0]).parent == folder
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.num_replies, rollout.num_repeat_rollouts) == (16, 8, 3)
    assert (rollout.max_user_turns, rollout.max_assistant_turns, rollout.max_new_tokens) == (2, 3, 2048)
    assert (config.optimizer.lr, config.algorithm.kl_coef) == (1e-6, 0.001)
    assert config.model.path == "Qwen/Qwen2.5-7B-Instruct"
    dry_run = ("--dry-run", "--gpus", "8x80", f"model.path={place / 'qwen'}")
    said = in_this_process(argv, capsys, *dry_run)
    assert "16 prompts x 8 replies = 128 replies, 384 futures" in said.out
    assert "token_amount" not in said.err
    assert "max_tokens" not in said.err
    if metric == "bleu_score":  # what the recipe's own unit and judge would mean here
        own = ("reward.settings.token_amount.unit=kilotokens", "simulators.judge.max_tokens=1024")
        warned = in_this_process(argv, capsys, *dry_run, *own).err
        assert "token_amount=-0.0001 is per kilotokens" in warned
        assert "simulators.judge.max_tokens=1024 is below" in warned
