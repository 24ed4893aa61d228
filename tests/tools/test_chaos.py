"""tools/chaos.py: which faults come, what counts as trained again, what is wrong at the end. The run itself is by hand:
its parts are in tests/end_to_end/test_failures.py and test_exact_resume.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.data.parquet import write_tasks
from collab_megatron.demo.tiny_model import write_model
from collab_megatron.rollout.clients import open_journal
from collab_megatron.types import LLMReply
from tests.conftest import REPOSITORY, environment
from tests.rollout.fakes import TASK
from tools import chaos
from tools.chaos import FAULTS, faults, lost_answers, problems, repetitions


def test_every_kind_comes_before_any_comes_again() -> None:
    made = list(faults(2 * len(FAULTS) + 1, random.Random(0)))
    assert set(made[: len(FAULTS)]) == set(made[len(FAULTS) : 2 * len(FAULTS)]) == set(FAULTS)
    assert made == list(faults(len(made), random.Random(0)))
    assert made != list(faults(len(made), random.Random(1)))


def test_an_endpoint_is_away_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "OUTAGE_S", 0.2)
    endpoint = chaos.Endpoint(f"{sys.executable} -c 'import time; time.sleep(60)'")
    try:
        first = endpoint.process
        endpoint.strike("SIGSTOP")
        assert (endpoint.process, first.poll()) == (first, None)
        endpoint.strike("SIGKILL")
        assert endpoint.process is not first
        assert (first.poll(), endpoint.process.poll()) == (-9, None)
    finally:
        endpoint.end()
    kinds = (*FAULTS, *chaos.OF_ENDPOINT)
    assert set(faults(len(kinds), random.Random(0), kinds)) == set(kinds)


def test_steps_that_were_trained_again_are_counted() -> None:
    lines = "".join(f"rl {step}/9 | reward 0.1\n" for step in (4, 3, 4, 5))
    assert repetitions(3, lines) == 2  # 4 is new at first
    assert repetitions(3, "step 3 is saved\nrl 3 of\n") == 0


def test_a_step_that_is_missing_or_twice_is_a_problem(tmp_path: Path) -> None:
    config = load_config(
        RLConfig,
        REPOSITORY / "conf" / "demo_rl.yaml",
        [f"run.dir={tmp_path}", "train.steps=3", "optimizer.warmup_steps=1"],
    )
    metrics = config.run.tensorboard_dir / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)

    def wrong(*steps: int, code: int = 0) -> list[str]:
        metrics.write_text("".join(json.dumps({"step": step, "train/tokens": 1.0}) + "\n" for step in steps))
        return problems(config, code)

    assert wrong(1, 2, 3) == []
    assert wrong(1, 2, 3, code=1) == ["the run ended with exit code 1"]
    assert Counter(text[:28] for text in [*wrong(1, 3), *wrong(1, 2, 2, 3)]) == {"metrics.jsonl has the steps ": 2}


def test_answers_that_the_journal_does_not_have_are_counted(tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=1)
    write_tasks(tmp_path / "tasks.parquet", [TASK])
    changes = [f"run.dir={tmp_path}", f"model.path={tmp_path}/model", f"data.train={tmp_path}/tasks.parquet"]
    config = load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", changes)
    (tmp_path / "answered").write_bytes(b"..")
    with closing(open_journal(config)) as journal:
        reply = LLMReply(("yes",), prompt_tokens=1, completion_tokens=1, cost_usd=0.0)
        journal.record_reply(b"key", "user", reply)
    assert lost_answers(config, tmp_path / "answered") == (2, 1)


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [sys.executable, "tools/chaos.py", "conf/demo_rl.yaml", f"run.dir={tmp_path}"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "is not empty: chaos needs a run of its own" in ended.stderr
