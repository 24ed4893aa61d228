"""The same programs on GPUs: bf16, NCCL, transformer-engine where it is installed. Skipped where there is none."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from collab_megatron.data.parquet import Conversation, write_conversations
from collab_megatron.types import Message
from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import Run
from tests.trainer.parallel.ranks import run_ranks
from tests.trainer.parallel.tiny import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


LAYOUTS = [
    {},
    {"packed": "true"},
    {"tensor": 2, "sequence_parallel": "true"},
    {"pipeline": 2, "packed": "true"},
    {"pipeline": 2, "interleave": 2},
    {"data": 2},
    {"context": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items()) or "one")
def test_log_probs_match_transformers_and_steps_are_finite(tmp_path: Path, layout: dict[str, str | int]) -> None:
    ranks = math.prod(size for size in layout.values() if isinstance(size, int) and size > 1)
    ranks //= int(layout.get("interleave", 1))
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, {torch.cuda.device_count()} are visible")
    if "context" in layout and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("context parallelism needs transformer-engine, which is not installed")
    folder = make_model(tmp_path / "model", "qwen3", num_hidden_layers=4)
    run_ranks(Path(__file__).parent / "gpu_ranks.py", ranks, str(folder), *(f"{k}={v}" for k, v in layout.items()))


def test_the_train_step_benchmark_reports_mfu(run: Run, tmp_path: Path) -> None:
    ended = run("tools/bench/train_step.py", "--json", str(tmp_path / "rows.json"), timeout_s=580)
    assert ended.code == 0, ended.output[-4000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    assert all(0 < row["mfu"] < 1 for row in rows)


@pytest.mark.parametrize("tensor", [1, 2])
def test_supervised_fine_tuning_in_bf16(run: Run, tiny_model: Path, tmp_path: Path, tensor: int) -> None:
    if torch.cuda.device_count() < tensor:
        pytest.skip(f"needs {tensor} GPUs, {torch.cuda.device_count()} are visible")
    chat = (Message("user", "hi a table for 4 please"), Message("assistant", "which time and day and name?"))
    write_conversations(tmp_path / "sft.parquet", [Conversation(str(i), chat) for i in range(16)])
    ended = run(
        *("-m", "collab_megatron.train_sft", "conf/demo_sft.yaml", f"run.dir={tmp_path / 'run'}"),
        *(f"model.path={tiny_model}", f"data.train={tmp_path / 'sft.parquet'}", f"export_hf={tmp_path / 'hf'}"),
        *("parallel.device=cuda", f"parallel.tensor={tensor}", "model.dtype=bfloat16"),
        *("train.steps=4", "batch_size=8", "optimizer.warmup_steps=1"),
    )
    assert ended.code == 0, ended.output[-4000:]
    assert newest_complete(tmp_path / "run" / "checkpoints" / "sft") is not None
    assert (tmp_path / "hf" / "model.safetensors").exists()
