"""Which tensors travel in one update call. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from collab_megatron.convert.exporter import TensorInfo


def dtype_name(dtype: torch.dtype) -> str:
    """The name SGLang's update calls use: "float32", "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cut_buckets(plan: Sequence[TensorInfo], bucket_bytes: int) -> list[list[TensorInfo]]:
    """Consecutive runs of `plan` of at most `bucket_bytes`; a larger tensor travels alone."""
    buckets: list[list[TensorInfo]] = []
    size = 0
    for tensor in plan:
        if not buckets or size + tensor.num_bytes > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.num_bytes
    return buckets
