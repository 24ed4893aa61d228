"""The curves of a dashboard in W&B's own file, written without a network by the real wandb."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from collab_megatron.trainer.report.dashboard import Dashboard, read_metrics
from tests.conftest import REPOSITORY, Run

TOOL = "tools/tensorboard_to_wandb.py"
BLOCK = 32768


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: 7 bytes, then pieces in blocks, as in a log of LevelDB."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a head: the rest of the block is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.slow
def test_every_point_of_every_curve_is_there_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    curves = tmp_path / "tensorboard" / "rl"
    for first, steps, attempt in ((0, 3, 1), (2, 5, 2)):  # a resume after step 2 replaces step 3
        dashboard = Dashboard(curves, first_step=first, attempt=attempt)
        for step in range(first + 1, steps + 1):
            many = {f"train/{number}": number * step for number in range(1, 400)}  # records of more than a block
            dashboard.log(step, {"reward/mr_mean": step / 8 + attempt, **many})
        dashboard.close()
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    command = [sys.executable, str(REPOSITORY / TOOL), str(curves), "--project", "mine"]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[int, dict[str, float]] = {}
    for raw in records(file):
        record = Record.FromString(raw)
        if record.HasField("history"):
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found[record.history.step.num] = {name: v for name, v in values.items() if not name.startswith("_")}
    written = {int(row.pop("step")): row for row in read_metrics(curves)}
    assert list(found) == list(written) == [1, 2, 3, 4, 5]
    assert found == {step: pytest.approx(row, rel=1e-6) for step, row in written.items()}


def test_a_wrong_folder_is_one_sentence(run: Run, tmp_path: Path) -> None:
    ended = run(TOOL, str(tmp_path), "--project", "mine")
    assert ended.code == 2
    assert f"error: {tmp_path} has no events.out.tfevents.*" in ended.errors[0]
