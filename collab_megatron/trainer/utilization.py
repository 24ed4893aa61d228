"""How much of the devices' arithmetic a step used: model FLOPs (model/flops.py) in the time of its passes."""

from __future__ import annotations

import torch

from collab_megatron.config.sections import ModelSection, ParallelSection
from collab_megatron.model.flops import peak_flops


def utilization(tflop: float, seconds: float, parallel: ParallelSection, model: ModelSection) -> dict[str, float]:
    """By dashboard name: TFLOP/s of a trainer rank and, in bf16 on a GPU whose peak is known, MFU (1 is the peak).

    tflop: of all ranks, without what is computed a second time (recomputation), as MFU is defined. seconds: wall time
    of the passes, optimizer included.
    """
    per_rank = tflop / max(seconds, 1e-9) / parallel.world_size
    found = {"train/tflop_per_s_per_rank": per_rank}
    if model.dtype == "bfloat16" and torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            found["train/mfu"] = per_rank * 1e12 / peak
    return found
