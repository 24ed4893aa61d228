"""tools/bench/weight_sync.py on a tiny shape and a real server: rows and errors; no speeds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from tools.bench import weight_sync
from tools.bench.weight_sync import SHAPES, rank_env, why_not

TOOL = "tools/bench/weight_sync.py"
TOOL_S = 280.0
KEYS = {"transport", "shape", "bytes", "seconds", "floor_seconds", "ratio", "peak_extra_bytes"}


@pytest.mark.slow
@pytest.mark.full
def test_a_row_for_every_transport(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "rows.json"
    done = run(TOOL, "--quick", "--dir", str(tmp_path), "--json", str(output), timeout_s=TOOL_S)
    assert done.code == 0, done.output
    rows = json.loads(output.read_text())
    assert [row["transport"] for row in rows] == ["broadcast", "ipc", "disk"]
    assert len(done.output.splitlines()) == len(rows)  # and nothing else was said
    assert sorted(tmp_path.iterdir()) == [output]  # models and weights are gone
    for row in rows:
        if "skipped" in row:
            continue
        assert set(row) >= KEYS
        assert row["shape"] == "tiny"
        assert row["tensors"] == 20
        assert row["bytes"] == num_bytes("tiny")
        assert row["seconds"] > 0
        assert row["floor_seconds"] > 0
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["seconds"] <= row["median_seconds"]
        assert row["floor_seconds"] <= row["median_floor_seconds"]
        assert row["publish_seconds"] > row["paused_s"] > 0
        assert row["peak_extra_bytes"] >= 0
        assert row["checked"] > 0


def num_bytes(shape: str) -> int:
    import torch

    total = sum(torch.Size(size).numel() for size in SHAPES[shape].tensors().values())
    return total * getattr(torch, SHAPES[shape].dtype).itemsize


def test_shapes_are_what_their_names_say() -> None:
    assert num_bytes("10m") == pytest.approx(4 * 10e6, rel=0.15)
    assert num_bytes("135m") == 4 * 134_515_008  # SmolLM2-135M
    assert num_bytes("1b") == 2 * 1_235_814_400  # Llama-3.2-1B
    assert num_bytes("135m-deep") == pytest.approx(num_bytes("135m"), rel=0.001)
    assert len(SHAPES["135m-deep"].tensors()) == pytest.approx(4 * len(SHAPES["135m"].tensors()), rel=0.01)


@pytest.mark.parametrize(
    "transport, gpus, world_size, engine_tensor, says",
    [
        ("broadcast", 0, 1, 1, None),  # on CPU everything goes
        ("ipc", 0, 2, 1, None),
        ("broadcast", 1, 1, 1, "needs 2 GPUs"),
        ("disk", 1, 1, 1, "needs 2 GPUs"),
        ("ipc", 1, 1, 1, None),
        ("ipc", 4, 2, 1, "every engine rank"),
        ("broadcast", 4, 2, 2, None),
    ],
)
def test_what_gpus_do_not_suffice_for(
    transport: str, gpus: int, world_size: int, engine_tensor: int, says: str | None
) -> None:
    reason = why_not(transport, gpus, world_size, engine_tensor)
    assert (reason is None) if says is None else (reason is not None and says in reason)


def test_ranks_know_their_place() -> None:
    env = rank_env(1, 2, 29500)
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_PORT"]) == ("1", "2", "29500")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--repeats", "0"], "--repeats"),
        (["--bucket-mb", "0"], "--bucket-mb"),
        (["--engine-tensor", "0"], "--engine-tensor"),
        (["--shapes", "70b"], "70b"),
        (["--transports", "pigeon"], "pigeon"),
        (["--dir", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], says: str, run: Run) -> None:
    done = run(TOOL, *arguments)
    assert done.code == 2
    assert says in done.output


def test_rows_are_written_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tools/gpu_check.py ends a benchmark at its deadline, and keeps what is there."""

    def until_the_deadline(name: str, args: argparse.Namespace) -> Iterator[dict[str, str]]:
        yield {"transport": "ipc", "shape": name, "skipped": "needs 2 GPUs"}
        raise TimeoutError

    monkeypatch.setattr(weight_sync, "measure", until_the_deadline)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # main sets it for good
    monkeypatch.setattr(sys, "argv", ["weight_sync.py", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(TimeoutError):
        weight_sync.main()
    assert [row["transport"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["ipc"]
