"""MFU of a step by hand."""

from __future__ import annotations

import pytest
import torch

from collab_megatron.config.sections import ModelSection, ParallelSection
from collab_megatron.trainer.utilization import utilization

GPUS = ParallelSection(tensor=2, data=4)


@pytest.mark.parametrize(
    "dtype, device, known",
    [("bfloat16", "NVIDIA H100 80GB HBM3", True), ("float32", "NVIDIA H100", False), ("bfloat16", "?", False)],
)
def test_mfu_is_the_share_of_the_peak_in_bf16(
    dtype: str, device: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    model = ModelSection.model_validate({"path": "m", "dtype": dtype})
    found = utilization(989 * 8, 2.0, GPUS, model)  # half of the peak of eight GPUs
    assert found["train/tflop_per_s_per_rank"] == pytest.approx(989 / 2)
    assert found.get("train/mfu") == (pytest.approx(0.5) if known else None)


def test_a_cpu_has_no_peak() -> None:
    model = ModelSection.model_validate({"path": "m"})
    assert ("train/mfu" in utilization(1.0, 1.0, ParallelSection(), model)) == torch.cuda.is_available()
