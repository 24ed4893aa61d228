"""The table of several models by its command, with a server that it starts: rows are selected and ordered, and each
plays with its own prompt although they share server and journal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.parquet import read_tasks, write_tasks
from collab_megatron.demo.pipeline import desk_addresses
from collab_megatron.demo.task_files import draw_tasks
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.types import Message, Task
from tests.conftest import DESK_KEY, REPOSITORY, Run, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(560)]

TASKS, NEW_TOKENS, PAIRS = 6, 8, 3
ROWS = ("base+proactive", "base")
"""As they are selected; the file has them in the other order, with a third between them."""
USERS = ("simulators.user", "bare")
PROACTIVE = "which time ?"  # in words of the tiny tokenizer


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    """A model with two prompts, and a row whose model is not there."""
    (tmp_path / "proactive.txt").write_text(PROACTIVE)
    drawn = draw_tasks(random.Random(1), "heldout", TASKS)
    tasks = [
        Task(f"t{n}", (Message("user", t.opening),), t.request, t.command, metadata={"ambiguous": t.ambiguous})
        for n, t in enumerate(drawn)
    ]
    write_tasks(tmp_path / "tasks.parquet", tasks)
    settings = {
        "extends": str(REPOSITORY / "conf" / "demo_evaluate.yaml"),
        "run": {"dir": str(tmp_path / "run"), "name": "evaluate_table"},
        "model": {"path": str(tiny_model)},
        "data": {"train": str(tmp_path / "tasks.parquet"), "validation": str(tmp_path / "tasks.parquet")},
        "rollout": {"max_new_tokens": NEW_TOKENS},
        "evaluation": {"users": {"unseen": None}},
        "models": {
            "base": {},
            "missing": {"path": str(tmp_path / "missing")},
            "base+proactive": {"proactive": True, "proactive_prompt_file": str(tmp_path / "proactive.txt")},
        },
        "compare": {"baseline": "base", "judged_pairs": PAIRS, "resamples": 50},
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_table_of_two_models(config: Path, tiny_model: Path, warm_run: Run, desk: Server, tmp_path: Path) -> None:
    addresses = [text for text in desk_addresses(desk.url, "user", "judge", mixture=False) if "unseen" not in text]
    ended = warm_run("-m", "collab_megatron.evaluate", str(config), *addresses, "--models", *ROWS, timeout_s=500)
    assert ended.code == 0, ended.output[-4000:]
    assert DESK_KEY not in ended.output
    for row in ROWS:
        assert f"held-out conversations with {row}\n" in ended.output

    folder = tmp_path / "run" / "evaluations" / "evaluate_table"
    table = json.loads((folder / "models.table.json").read_text())
    assert table["baseline"] == "base"
    assert [(row["model"], row["user"]) for row in table["rows"]] == [(row, user) for row in ROWS for user in USERS]
    for row in table["rows"]:
        assert (row["conversations"], row["failed"], row["continued"]) == (TASKS, 0, 0)
        assert set(row["figures"]) >= {"accuracy", "tokens_k", "interactivity", "mr"}
        assert (row["wins"] is None) == (row["difference"] == {}) == (row["model"] == "base")
        if row["wins"] is not None:
            assert row["wins"]["won"] + row["wins"]["tied"] + row["wins"]["lost"] == PAIRS

    page = (folder / "models.table.md").read_text()
    models = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert models == ["model", "---", *(row for row in ROWS for _ in USERS)]
    assert "* differs from base" in page

    tasks = read_tasks(tmp_path / "tasks.parquet")
    assert first_replies(folder / "models-base.jsonl") != first_replies(folder / "models-base+proactive.jsonl")
    for row in ROWS:
        system = (Message("system", PROACTIVE),) if row == "base+proactive" else ()
        expected = greedy_replies(tiny_model, tasks, system)
        for user in ("", ".bare"):
            assert first_replies(folder / f"models-{row}{user}.jsonl") == expected
        figures = json.loads((folder / f"models-{row}.json").read_text())
        (of_own, of_bare) = (each["figures"] for each in table["rows"] if each["model"] == row)
        assert figures["mr"] == pytest.approx(of_own["mr"]["mean"])
        assert figures["users/bare/mr"] == pytest.approx(of_bare["mr"]["mean"])
        dashboard = tmp_path / "run" / "tensorboard" / "evaluate_table" / row
        (point,) = read_metrics(dashboard)
        for name in ("mr", "accuracy", "users/bare/mr"):
            assert point[f"eval/{name}"] == pytest.approx(figures[name])
        assert list(dashboard.glob("events.out.tfevents.*"))
    assert [file.name for file in (tmp_path / "run" / "journal").glob("*.sqlite")] == ["evaluate_table-models.sqlite"]


def first_replies(file: Path) -> dict[str, list[int]]:
    """Task id -> token ids of the model's first turn."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["task_id"]: line["replies"][0]["token_ids"] for line in lines}


def greedy_replies(model_folder: Path, tasks: list[Task], system: tuple[Message, ...]) -> dict[str, list[int]]:
    """The same by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    chat = ChatTemplate(load_tokenizer(model_folder))
    found = {}
    for task in tasks:
        prompt = torch.tensor([chat.prompt_ids((*system, *task.prompt))])
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
        found[task.task_id] = made[0, prompt.shape[1] :].tolist()
    return found
