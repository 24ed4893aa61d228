"""Whole programs on one GPU: a supervised run in bf16, and the train-step benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collab_megatron.data.parquet import Conversation, write_conversations
from collab_megatron.types import Message
from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import Run
from tests.gpu.device import DEVICE, ON_DEVICE, need_gpus

pytestmark = ON_DEVICE

PHASES = ["logprobs", "forward_backward", "step"]
BENCH_S = 400.0


@pytest.mark.parametrize("tensor", [1, 2])
def test_supervised_fine_tuning_in_bf16(run: Run, tiny_model: Path, tmp_path: Path, tensor: int) -> None:
    need_gpus(tensor)
    chat = (Message("user", "hi a table for 4 please"), Message("assistant", "which time and day and name?"))
    write_conversations(tmp_path / "sft.parquet", [Conversation(str(i), chat) for i in range(16)])
    ended = run(
        *("-m", "collab_megatron.train_sft", "conf/demo_sft.yaml", f"run.dir={tmp_path / 'run'}"),
        *(f"model.path={tiny_model}", f"data.train={tmp_path / 'sft.parquet'}", f"export_hf={tmp_path / 'hf'}"),
        *(f"parallel.device={DEVICE}", f"parallel.tensor={tensor}", "model.dtype=bfloat16"),
        *("train.steps=4", "batch_size=8", "optimizer.warmup_steps=1"),
    )
    assert ended.code == 0, ended.output[-4000:]
    assert newest_complete(tmp_path / "run" / "checkpoints" / "sft") is not None
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.timeout(BENCH_S + 20)  # what pytest allows by default is shorter
def test_the_train_step_benchmark_measures_every_phase(run: Run, tmp_path: Path) -> None:
    """On a GPU the shape of a real model, with MFU; a side that does not fit costs its figures, not ours."""
    shape = "qwen2.5-1.5b" if DEVICE == "cuda" else "tiny"
    options = ("--shapes", shape, "--dtypes", "bfloat16", "--repeats", "1", "--json", str(tmp_path / "rows.json"))
    ended = run("tools/bench/train_step.py", *options, timeout_s=BENCH_S)
    assert ended.code == 0, ended.output[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["phase"] for row in rows] == PHASES
    assert [row.get("skipped") for row in rows] == [None] * len(PHASES)
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert DEVICE == "cpu" or 0 < row["mfu"] < 1
