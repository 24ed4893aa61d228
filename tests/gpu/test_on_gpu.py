"""The same programs on GPUs: bf16, NCCL, transformer-engine where it is installed. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from collab_megatron.checkpoint.folders import newest_complete
from collab_megatron.data.parquet import Conversation, write_conversations
from collab_megatron.types import Message
from tests.conftest import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


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
