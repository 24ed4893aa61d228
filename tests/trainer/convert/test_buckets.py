"""The split of the table into buckets: complete, within the size, and marked if it may be sent unpacked."""

from __future__ import annotations

import pytest
import torch

from collab_megatron.model.spec import ModelSpec
from collab_megatron.trainer.convert import buckets
from collab_megatron.trainer.convert.buckets import Bucket, bucket_plan, row_tensors, tensor_plan
from tests.trainer.parallel.tiny import spec_of

BUCKET_BYTES = 40_000


def plan_of(spec: ModelSpec, *, cut: bool, pipeline: int = 1) -> list[Bucket]:
    return bucket_plan(spec, torch.float32, pipeline=pipeline, interleave=1, bucket_bytes=BUCKET_BYTES, cut=cut)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3moe"])
def test_every_tensor_stands_in_one_bucket_that_is_not_too_large(kind: str, pipeline: int, cut: bool) -> None:
    spec = spec_of(kind, num_hidden_layers=4)
    plan = plan_of(spec, cut=cut, pipeline=pipeline)
    assert [tensor for bucket in plan for tensor in bucket.tensors] == tensor_plan(spec, torch.float32)
    assert [bucket.number for bucket in plan] == list(range(len(plan)))
    assert {bucket.stage for bucket in plan} == set(range(pipeline))
    assert all(bucket.num_bytes <= BUCKET_BYTES or len(bucket.rows) == 1 for bucket in plan)
    assert any(len(bucket.rows) > 1 for bucket in plan)


def test_a_row_of_more_than_half_a_bucket_is_alone_unless_it_must_be_gathered() -> None:
    spec = spec_of("llama", num_hidden_layers=4)

    def largest_in_company(cut: bool) -> int:
        """Bytes of the largest row that shares its bucket."""
        rows = (row for bucket in plan_of(spec, cut=cut) if len(bucket.rows) > 1 for row in bucket.rows)
        return max(sum(tensor.num_bytes for tensor in row_tensors(row, spec, torch.float32)) for row in rows)

    assert largest_in_company(cut=False) <= BUCKET_BYTES / 2 < largest_in_company(cut=True)


def test_only_large_tensors_of_an_uncut_model_travel_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("llama", num_hidden_layers=4)
    assert not any(bucket.apart for bucket in plan_of(spec, cut=False)), "they are all small"
    monkeypatch.setattr(buckets, "APART_BYTES", 8_000)
    apart = [bucket.apart for bucket in plan_of(spec, cut=False)]
    assert any(apart)
    assert not all(apart)
    assert not any(bucket.apart for bucket in plan_of(spec, cut=True))
