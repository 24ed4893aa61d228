"""The device of the tests in this folder: a GPU, or the CPU, where they prove that the tests themselves are sound.

    DEVICE=cuda python -m pytest tests/gpu
    COLLAB_MEGATRON_GPU_TESTS=cpu python -m pytest tests/gpu

tools/gpu_check.py runs them on either.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from typing import Literal

import pytest
import torch

DEVICE: Literal["cpu", "cuda"] = "cpu" if os.environ.get("COLLAB_MEGATRON_GPU_TESTS") == "cpu" else "cuda"
ENGINE_ARGS = tuple(shlex.split(os.environ.get("COLLAB_MEGATRON_GPU_ENGINE_ARGS", "")))
"""More flags of sglang.launch_server, for machines without some of its kernels."""
PART_S = float(os.environ.get("COLLAB_MEGATRON_GPU_PART_S", "inf"))
"""After these seconds tools/gpu_check.py ends the tests. One that has not failed by then leaves no reason."""

ON_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="no CUDA device is visible; where there is one, DEVICE=cuda shows it to the tests",
    ),
]


def need_gpus(count: int) -> None:
    """Skip the test where there are fewer. On the CPU as many ranks run as are asked for."""
    if DEVICE == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, {torch.cuda.device_count()} are visible")


def has_transformer_engine() -> bool:
    return DEVICE == "cuda" and importlib.util.find_spec("transformer_engine") is not None
