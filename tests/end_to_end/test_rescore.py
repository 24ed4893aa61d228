"""The record of a real run under another reward, with the real judge over HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.rollout.record_files import read_trees
from tests.conftest import REPOSITORY, Ended, Run, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_same_reward_gives_the_same_advantages_and_a_judge_is_paid_once(
    warm_run: Run, short_demo: tuple[Path, Ended], desk: Server, tmp_path: Path
) -> None:
    demo, _ = short_demo
    resolved = demo / "logs" / "rl" / "latest" / "resolved.yaml"
    given = ("-m", "collab_megatron.rescore", str(resolved), f"run.dir={tmp_path}")
    record = ("--record", str(demo / "conversations" / "rl"))
    judge = (f"simulators.judge.api_base={desk.url}",)

    same = warm_run(*given, *record, "--output", str(tmp_path / "same.jsonl"))
    assert same.code == 0, same.output
    assert "calls       0, $0.0000" in same.output
    before, after = (
        list(read_trees(demo / "conversations" / "rl")),
        [json.loads(line) for line in (tmp_path / "same.jsonl").read_text().splitlines()],
    )
    assert len(before) == len(after) > 0
    for old, new in zip(before, after, strict=True):
        assert [(r["mr"], r["advantage"], r["same_as"]) for r in old["replies"]] == [
            (r["mr"], r["advantage"], r["same_as"]) for r in new["replies"]
        ]

    again = warm_run(*given, *judge, *record, "--again", "interactivity")  # the demo's judge goes by rules
    assert again.code == 0, again.output
    calls = re.search(r"^calls +(\d+),", again.output, re.M)
    assert calls is not None
    assert int(calls[1]) > 0
    assert re.search(r"^scored +[1-9]\d* conversations, 0 without a usable score$", again.output, re.M)
    shown = re.search(r"^reward +(\S+) before, (\S+) now", again.output, re.M)
    assert shown is not None
    assert shown[1] == shown[2]
    gone = warm_run(*given, "simulators.judge.api_base=http://127.0.0.1:9/v1", *record, "--again", "interactivity")
    assert gone.code == 0, gone.output  # every answer was kept

    wrong = warm_run(*given, *record, "--steps", "99")
    assert (wrong.code, len(wrong.errors)) == (2, 1)
    assert "has no trees of steps 99" in wrong.errors[0]


def test_the_metric_and_the_configs_of_docs_first_hour(short_demo: tuple[Path, Ended], tmp_path: Path) -> None:
    demo, _ = short_demo
    page = (REPOSITORY / "docs" / "first_hour.md").read_text()
    files = re.findall(r"^```\w+\n# (mine/\S+)\n(.*?)^```$", page, re.M | re.S)
    assert [name for name, _ in files] == ["mine/my_metrics.py", "mine/first.yaml", "mine/smol.yaml"]
    for folder in ("mine", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "conf").symlink_to(REPOSITORY / "conf")
    (tmp_path / "runs" / "first").symlink_to(demo)
    for name, text in files:
        (tmp_path / name).write_text(text)
    (command,) = re.findall(r"^python (-m collab_megatron.rescore .*?) +#", page, re.M)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DESK_API_KEY": "any-key"}
    argv = [sys.executable, *command.split()]
    said = subprocess.run(argv, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "calls       0, $0.0000" in said.stdout
    assert re.search(r"^ +few_words \d\.\d{3}, weight 0.5$", said.stdout, re.M)
    smol = load_config(RLConfig, tmp_path / "mine" / "smol.yaml")
    assert (smol.parallel.tensor, smol.train.steps) == (1, 5)
    assert smol.reward.metric_weights["few_words"] == 0.5
