"""Which tensors travel together. The real sync is met in tests/end_to_end: both sides agree after every step."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from collab_megatron.convert.exporter import TensorInfo
from collab_megatron.resharding.buckets import cut_buckets, dtype_name


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(4, 400))
def test_order_is_kept_and_no_bucket_is_too_large(sizes: list[int], limit: int) -> None:
    plan = [TensorInfo(f"t{i}", (size,), torch.float32) for i, size in enumerate(sizes)]
    buckets = cut_buckets(plan, limit)
    assert [tensor for bucket in buckets for tensor in bucket] == plan
    for bucket in buckets:
        assert bucket
        assert sum(tensor.num_bytes for tensor in bucket) <= limit or len(bucket) == 1


def test_dtypes_are_named_as_sglang_names_them() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert dtype_name(torch.float32) == "float32"
