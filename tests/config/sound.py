"""The sound configs that the table of bad inputs changes, and the ways it spoils a model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from collab_megatron.data.parquet import Conversation, Pair, write_conversations, write_pairs, write_tasks
from collab_megatron.types import Message
from tests.config.table import World
from tests.rollout.fakes import TASK

MODEL = "model.safetensors"
_LENGTH_BYTES = 8  # of a safetensors file, before its header


def write_world(folder: Path, model: Path, port: int) -> World:
    """`folder` with model, data and one config for each program. Something must listen on `port`."""
    world = World(folder)
    world.model.symlink_to(model)
    write_tasks(folder / "train.parquet", [replace(TASK, task_id=f"t{number}") for number in range(4)])
    held = replace(TASK, task_id="held", single_turn_prompt="another one")
    write_tasks(folder / "held.parquet", [held])
    chat = (Message("user", "a"), Message("assistant", "b"))
    write_conversations(folder / "sft.parquet", [Conversation(f"c{number}", chat) for number in range(4)])
    better, worse = (Message("assistant", "which day?"),), (Message("assistant", "monday"),)
    write_pairs(folder / "dpo.parquet", [Pair(f"c{number}", chat[:1], better, worse) for number in range(4)])
    problem = {"single_turn_prompt": "book a room", "single_turn_completion": "book"}
    (folder / "problems.jsonl").write_text(json.dumps(problem) + "\n")

    def role(name: str) -> dict[str, Any]:
        prices = {"input_usd_per_mtoken": 0, "output_usd_per_mtoken": 0}
        base = f"http://127.0.0.1:{port}/v1"
        return {"model": f"hosted_vllm/desk-{name}", "api_base": base, "api_key_env": "DESK_API_KEY", **prices}

    players = {"user": role("user"), "judge": role("judge")}
    reward = {"metric_weights": {"accuracy": 1.0, "interactivity": 1.0}, "accuracy_verifier": "exact"}
    named = {"path": str(world.model), "dtype": "float32"}
    tasks = {"train": str(folder / "train.parquet"), "validation": str(folder / "held.parquet")}
    small = {"max_new_tokens": 24, "max_prompt_tokens": 128, "prompts_per_step": 4, "num_replies": 2}
    played = {"model": named, "data": tasks, "simulators": players, "reward": reward, "rollout": small}
    cpu = {"parallel": {"device": "cpu"}}
    supervised = {"batch_size": 2, "max_tokens": 128, **cpu, "train": {"steps": 3}}
    configs: dict[str, dict[str, Any]] = {
        "train_rl": {**played, **cpu, "train": {"steps": 3}},
        "evaluate": {**played, **cpu},
        "train_sft": {"model": named, "data": {"train": str(folder / "sft.parquet")}, **supervised},
        "train_dpo": {"model": named, "data": {"train": str(folder / "dpo.parquet")}, **supervised},
        "build": {
            "problems": str(folder / "problems.jsonl"),
            "output": str(folder / "built"),
            "simulators": {**players, "assistant": role("assistant")},
            "reward": reward,
        },
    }
    for program, config in configs.items():
        world.config_of(program).write_text(yaml.safe_dump(config))
    return world


def model_with(change: Callable[[Path], object]) -> Callable[[Path, World], object]:
    """The model's folder copied to DIR/model and changed."""

    def prepare(own: Path, world: World) -> None:
        shutil.copytree(world.model, own / "model")
        change(own / "model")

    return prepare


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the header of a safetensors file claims; its tensors stay."""
    content = file.read_bytes()
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(_LENGTH_BYTES, "little") + text + content[_LENGTH_BYTES + length :])
