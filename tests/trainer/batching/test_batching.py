"""Micro-batches, shared prompts, balanced partition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collab_megatron.trainer.batching import TokenSample, idle_like, split_by_tokens
from collab_megatron.trainer.batching.micro_batch import MicroBatch, collate, of_one_length
from collab_megatron.trainer.batching.partition import balanced_partition


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


replies = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=20)  # (prompt, reply tokens)


def reply(prompt: int, length: int) -> TokenSample:
    before = [1, 4, 6, 11][prompt]
    ids = [prompt] * before + list(range(100, 100 + length))
    mask = [0.0] * before + [1.0] * length
    return TokenSample(ids, mask, {"x": [float(i) for i in ids]}, shareable=before - 1)


@given(replies, st.integers(24, 80), st.sampled_from([1, 4]))
@settings(max_examples=60, deadline=None)
def test_replies_share_their_prompt_and_lose_nothing(found: list[tuple[int, int]], budget: int, multiple: int) -> None:
    samples = [reply(*each) for each in found]
    batches = split_by_tokens(samples, micro_batch_tokens=budget, pad_id=0, pad_multiple=multiple, share=True)
    assert sorted(i for batch in batches for i in batch.sample_indices) == list(range(len(samples)))
    for batch in batches:
        assert batch.ids.shape[1] % multiple == 0
        assert batch.ids.shape[1] <= budget
        mine = [samples[i] for i in batch.sample_indices]
        for sample, ids, mask, x in zip(
            mine, *(batch.per_sample(v) for v in (batch.ids, batch.mask, batch.values["x"])), strict=True
        ):
            assert ids.tolist() == sample.ids
            assert mask.tolist() == sample.mask
            assert (x * mask).tolist() == [i * m for i, m in zip(sample.values["x"], sample.mask, strict=True)]
        assert batch.num_trained_tokens == sum(sum(sample.mask) for sample in mine)
        # what a row saves: every prompt but one of each group
        groups = {sample.prefix: sum(sample.prefix == other.prefix for other in mine) for sample in mine}
        saved = sum((count - 1) * len(prefix) for prefix, count in groups.items())
        assert batch.num_tokens == sum(len(sample.ids) for sample in mine) - saved


def test_a_shared_token_cannot_be_trained() -> None:
    wrong = TokenSample([1, 2, 3], [0.0, 1.0, 1.0], shareable=1)
    with pytest.raises(ValueError, match="which it shares with others"):
        split_by_tokens([wrong, wrong], micro_batch_tokens=9, pad_id=0, share=True)


def test_an_empty_batch_trains_nothing() -> None:
    (batch,) = split_by_tokens([sample(3)], micro_batch_tokens=8, pad_id=0)
    assert idle_like(batch, 1).num_trained_tokens == 0
    with pytest.raises(ValueError):
        split_by_tokens([], micro_batch_tokens=8, pad_id=0)


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_shares_are_a_partition_and_close(costs: list[int], ranks: int) -> None:
    shares = balanced_partition(costs, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def packed(*lengths: int) -> list[MicroBatch]:
    """One packed row for each length."""
    samples = [TokenSample([7] * n, [0.0] + [1.0] * (n - 1), {"advantages": [0.5] * n}) for n in lengths]
    return [collate([sample], (i,), 0, 1, True) for i, sample in enumerate(samples)]


def test_rows_of_a_pipeline_get_one_length_if_that_costs_little() -> None:
    batches = packed(20, 19, 20, 17)
    same = of_one_length(batches)
    assert [batch.ids.shape for batch in same] == [(1, 20)] * 4
    for before, after in zip(batches, same, strict=True):
        length = before.ids.shape[1]
        assert torch.equal(after.ids[:, :length], before.ids)
        assert after.num_trained_tokens == before.num_trained_tokens
        assert not after.values["advantages"][:, length:].any()
        assert sum(group.prefix + sum(group.own) for group in after.segments) == 20
    for kept in (
        packed(20, 10),
        [*packed(20), *split_by_tokens([TokenSample([7] * 19, [1.0] * 19)], micro_batch_tokens=99, pad_id=0)],
    ):
        assert [batch.ids.shape for batch in of_one_length(kept)] == [batch.ids.shape for batch in kept]


def test_rows_are_where_the_model_predicts_a_trained_token() -> None:
    """In the model's order: position by position, of every row."""
    samples = [TokenSample([1, 2, 3], [0.0, 1.0, 1.0]), TokenSample([4, 5, 6], [0.0, 0.0, 1.0])]
    labelled = collate(samples, (0, 1), 0, 1, False).by_predicting_position()
    assert labelled.trained_rows().tolist() == [0, 2, 3]
    labels = labelled.ids.t().flatten()[labelled.trained_rows()]
    assert labels.tolist() == [2, 3, 6]
