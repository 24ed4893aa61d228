"""tools/build_dataset.py: nested rows, proactive candidates, and a model of one's own as the assistant."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import yaml

from collab_megatron.data.dataset_source import load_rows
from tests.conftest import REPOSITORY, environment
from tests.engine.real_servers import SGLANG
from tests.tools.build_helpers import TOOL_S, build, built_rows
from tests.warm import STARTS, read_starts, run_warm

pytestmark = pytest.mark.slow


def test_nested_rows_are_resumed_and_prepared_like_flat_ones(config: Path, tmp_path: Path) -> None:
    build(config, "num_conversations=8", "form=nested")
    shard = tmp_path / "built" / "conversations-000.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    assert sorted(json.loads(line)["conv_id"] for line in lines) == list(range(8))
    shard.write_text("".join(lines[:-1]) + lines[-1][:60])  # a kill inside a line
    again = build(config, "num_conversations=8", "form=nested")
    assert again.before == 7
    build(config, "num_conversations=8", f"output={tmp_path / 'flat'}")
    nested, flat = (
        sorted(load_rows(str(tmp_path / name)), key=lambda row: (int(row.conv_id), row.turn_id, row.completion))
        for name in ("built", "flat")
    )
    assert nested == flat


def test_proactive_candidates_of_a_miniature(desk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of MATH, mapped; a candidate of each turn sees the reference, and asks for what the chat lacks."""
    monkeypatch.setenv("DESK_API_KEY", "any")  # the endpoint wants none
    overrides = [f"simulators.{role}.api_base={desk}" for role in ("user", "judge", "assistant")]
    overrides += [f"output={tmp_path / 'built'}", "tokenizer=null", "num_conversations=6"]
    progress = build(REPOSITORY / "conf" / "mini" / "math_data.yaml", *overrides)
    assert progress.complete
    rows = built_rows(tmp_path / "config")
    assert {row["conv_id"] for row in rows} == set(range(6))
    assert rows[0]["single_turn_metadata"] == {"level": "Level 5", "type": "Geometry"}
    asked = [row for row in rows if row["turn_id"] == 0 and row["completion"].endswith("?")]
    assert any(row["proactive"] for row in asked)
    best = max(asked, key=lambda row: row["score"])
    assert best["rewards"]["accuracy"] == [1.0, 1.0]
    assert best["score"] > max(row["score"] for row in rows if row["turn_id"] == 0 and row not in asked)


def test_a_model_of_ones_own_is_the_assistant(config: Path, tmp_path: Path, tiny_model: Path) -> None:
    """A real SGLang server, which the build starts and ends."""
    raw = yaml.safe_load(config.read_text())
    raw["simulators"]["assistant"] = {"max_tokens": 16, "timeout_s": 60.0, "deadline_s": 120.0}
    raw |= {"model": {"path": str(tiny_model), "dtype": "float32"}, "parallel": {"device": "cpu"}}
    raw |= {"engine": {"max_total_tokens": 4096, "max_running_requests": 8}, "max_total_turns": 1, "max_user_turns": 1}
    config.write_text(yaml.safe_dump(raw))
    log, starts = tmp_path / "output", tmp_path / "starts"
    argv = ("tools/build_dataset.py", str(config), "num_conversations=4")
    code = run_warm(log, argv, {**environment(), STARTS: str(starts)}, SGLANG, timeout_s=3 * TOOL_S)
    assert code == 0, log.read_text()
    rows = built_rows(config)
    assert rows
    assert "assistant: " in log.read_text()
    assert all(row["completion"].strip() for row in rows)
    servers = [one for one in read_starts(starts) if "sglang.launch_server" in one.argv]
    assert [psutil.pid_exists(one.pid) and psutil.Process(one.pid).status() for one in servers] == [False]
