"""Division of a global batch over the data ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from collab_megatron.config.sections import TrainSection
from collab_megatron.model.flops import forward_flops
from collab_megatron.trainer.batching import MicroBatch, TokenSample
from collab_megatron.trainer.rank_batch import RankBatch, rank_batch
from tests.trainer.one_process import SPEC, grid_of

PADDED = TrainSection(micro_batch_tokens=64, share_prompts=False)
SHARED = TrainSection(micro_batch_tokens=64)


def sample(prompt: int, number: int, reply: int) -> TokenSample:
    """Its first trained token, 100 + number, tells it from the others."""
    ids = [prompt] * 20 + [100 + number] * reply
    return TokenSample(ids, [0.0] * 20 + [1.0] * reply, shareable=19)


def parts(samples: list[TokenSample], ranks: int, train: TrainSection, **grid: int | str) -> list[RankBatch]:
    return [rank_batch(grid_of(rank, ranks, **grid), SPEC, samples, train) for rank in range(ranks)]  # type: ignore[arg-type]


def trained(batches: list[MicroBatch]) -> Counter[int]:
    """Token id -> how often it is trained."""
    return Counter(int(i) for batch in batches for i in batch.ids[batch.mask > 0])


@pytest.mark.parametrize("train", [PADDED, SHARED])
def test_every_token_is_trained_once_on_one_data_rank(train: TrainSection) -> None:
    samples = [sample(number % 3, number, 5 + number) for number in range(9)]
    found = parts(samples, 3, train)
    assert sum((trained(part.micro_batches) for part in found), Counter()) == {100 + n: 5 + n for n in range(9)}
    assert {part.imbalance for part in found} == {found[0].imbalance}
    assert 1.0 <= found[0].imbalance < 1.5


@pytest.mark.parametrize("train", [PADDED, SHARED])
def test_indices_are_those_of_the_global_batch(train: TrainSection) -> None:
    samples = [sample(number % 3, number, 5 + number) for number in range(9)]
    seen = []
    for part in parts(samples, 3, train):
        for batch in part.micro_batches:
            for index, ids_T in zip(batch.sample_indices, batch.per_sample(batch.ids), strict=True):
                assert ids_T.tolist() == samples[index].ids
                seen.append(index)
    assert sorted(seen) == list(range(9))


def test_a_rank_without_a_sample_has_a_micro_batch_that_trains_nothing() -> None:
    first, second = parts([sample(1, 0, 5)], 2, PADDED)
    assert trained(first.micro_batches) == {100: 5}
    (idle,) = second.micro_batches
    assert (idle.num_trained_tokens, idle.sample_indices) == (0, ())
    assert first.imbalance == second.imbalance == 2.0


def test_the_replies_to_one_prompt_stay_on_one_rank_and_share_it() -> None:
    samples = [sample(number // 3, number, 6) for number in range(6)]
    for part in parts(samples, 2, SHARED):
        assert len({(token - 100) // 3 for token in trained(part.micro_batches)}) == 1
        assert sum(batch.num_tokens for batch in part.micro_batches) == 19 + 3 * 7


@pytest.mark.parametrize("grid", [{"device": "cuda"}, {"cp_size": 2}])
def test_no_prompt_is_shared_where_attention_cannot_do_it(grid: dict[str, int | str]) -> None:
    (part,) = parts([sample(1, number, 6) for number in range(3)], 1, SHARED, **grid)
    assert sum(batch.num_tokens for batch in part.micro_batches) == 3 * 26
    assert not any(batch.packed for batch in part.micro_batches)


def test_flops_count_a_shared_prompt_once() -> None:
    """19 of a prompt's 20 tokens are shared; three replies of 6 behind it. The same on every rank."""
    samples = [sample(1, number, 6) for number in range(3)]
    (apart,) = parts(samples, 1, PADDED)
    (shared,) = parts(samples, 1, SHARED)
    assert apart.forward_flops == pytest.approx(forward_flops(SPEC, [26] * 3, trained=18))
    assert shared.forward_flops == pytest.approx(apart.forward_flops - 2 * forward_flops(SPEC, [19], trained=0))
    assert {part.forward_flops for part in parts(samples, 2, PADDED)} == {apart.forward_flops}
