"""Micro-batches and shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collab_megatron.batching import TokenSample, idle_like, split_by_tokens
from collab_megatron.batching.balance import balanced_shares


def sample(length: int) -> TokenSample:
    return TokenSample(ids=range(1, length + 1), mask=[1.0] * length, values={"x": [0.5] * length})


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 200), st.sampled_from([1, 2, 8]))
@settings(max_examples=50, deadline=None)
def test_every_sample_once_within_the_token_budget(lengths: list[int], budget: int, multiple: int) -> None:
    batches = split_by_tokens([sample(n) for n in lengths], micro_batch_tokens=budget, pad_id=0, pad_multiple=multiple)
    assert sorted(i for batch in batches for i in batch.sample_indices) == list(range(len(lengths)))
    for batch in batches:
        rows, padded = batch.ids.shape
        assert padded % multiple == 0
        assert rows * padded <= budget or rows == 1
        for row, i in enumerate(batch.sample_indices):
            assert batch.ids[row, : lengths[i]].tolist() == list(range(1, lengths[i] + 1))
            assert batch.mask[row].sum() == lengths[i] - 1  # the first token has nothing before it
            assert batch.values["x"][row, lengths[i] :].sum() == 0


def test_an_empty_batch_trains_nothing() -> None:
    (batch,) = split_by_tokens([sample(3)], micro_batch_tokens=8, pad_id=0)
    assert idle_like(batch, 1).num_trained_tokens == 0
    with pytest.raises(ValueError):
        split_by_tokens([], micro_batch_tokens=8, pad_id=0)


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_shares_are_a_partition_and_close(costs: list[int], ranks: int) -> None:
    shares = balanced_shares(costs, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
