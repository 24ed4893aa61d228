"""Merged turns: fewer sequences, the same trained tokens, loss and gradients as the turns alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.batching import TokenSample, split_by_tokens
from collab_megatron.trainer.batching.merged_turns import merge_turns
from collab_megatron.trainer.loss.policy_step import make_policy_loss, token_sample
from collab_megatron.types import TrainingSample

VOCABULARY, WIDTH = 12, 6


def turn(context: Sequence[int], own: Sequence[int], advantage: float = 1.0) -> TokenSample:
    logprobs = tuple(-0.1 * (token + 1) for token in own)
    sample = TrainingSample(tuple(context), tuple(own), logprobs, (0,) * len(own), advantage)
    return token_sample(sample, 0, [advantage] * len(own))


def loss_and_gradient(samples: Sequence[TokenSample], *, share: bool, tokens: int = 40) -> tuple[float, torch.Tensor]:
    """GRPO's loss under a causal model in fp64: a token's logits are a function of all tokens before it."""
    weights = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights.requires_grad_()
    output = torch.randn(WIDTH, VOCABULARY, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss_fn = make_policy_loss(AlgorithmSection(kl_coef=0.0))
    total = torch.zeros((), dtype=torch.float64)
    for batch in split_by_tokens(samples, micro_batch_tokens=tokens, pad_id=0, share=share):
        logprobs = torch.zeros(batch.ids.shape, dtype=torch.float64)
        whole = batch.per_sample(batch.ids)
        for ids, (row, columns) in zip(whole, batch.spans(), strict=True):
            state = torch.tanh(torch.cumsum(weights[ids], dim=0))[:-1]
            of_tokens = torch.log_softmax(state @ output, dim=-1).gather(1, ids[1:, None])[:, 0]
            own = torch.cat([torch.zeros(1, dtype=torch.float64), of_tokens])[
                len(ids) - (columns.stop - columns.start) :
            ]
            logprobs = logprobs.index_put((torch.tensor(row), torch.arange(columns.start, columns.stop)), own)
        total = total + loss_fn(logprobs, batch).loss
    total.backward()
    assert weights.grad is not None
    return total.item(), weights.grad


def trained(samples: Sequence[TokenSample]) -> list[tuple[int, ...]]:
    """Every trained token with all before it."""
    return sorted(tuple(sample.ids[: t + 1]) for sample in samples for t, value in enumerate(sample.mask) if value)


def conversations() -> list[TokenSample]:
    """Two equal replies and another one; futures of the first with a common turn, and of the other."""
    prompt, a, b = [1, 2, 3], [4, 5], [6]
    first = [*prompt, *a, 7]
    return [
        turn(prompt, a, 0.5),
        turn(prompt, a, 0.5),
        turn(prompt, b, -1.0),
        turn(first, [8, 9], 0.25),
        turn([*first, 8, 9, 7], [4], 2.0),
        turn([*first, 8, 9, 1], [5, 5], -2.0),
        turn([*prompt, *a, 2], [3], -0.75),
        turn([*prompt, *b, 2], [3], 1.5),
    ]


@pytest.mark.parametrize("share", [False, True])
def test_loss_and_gradient_equal_those_of_the_turns_alone(share: bool) -> None:
    samples = conversations()
    merged = merge_turns(samples)
    assert len(merged) == 4  # one for each end of a conversation
    assert sum(len(sample.ids) for sample in merged) < sum(len(sample.ids) for sample in samples) / 1.5
    assert trained(merged) == trained(samples)
    alone, gradient = loss_and_gradient(samples, share=False)
    together, of_merged = loss_and_gradient(merged, share=share)
    assert together == pytest.approx(alone, rel=1e-6)  # advantages are fp32
    torch.testing.assert_close(of_merged, gradient, rtol=1e-6, atol=1e-8)


def test_both_equal_replies_are_trained_in_the_two_conversations_that_go_on_from_them() -> None:
    merged = {tuple(sample.ids): sample for sample in merge_turns(conversations())}
    long = merged[1, 2, 3, 4, 5, 7, 8, 9, 1, 5, 5]
    assert [int(value) for value in long.mask] == [0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    assert long.values["advantages"][3:] == [0.5, 0.5, 0.0, 0.25, 0.25, 0.0, -2.0, -2.0]
    assert [int(value) for value in merged[1, 2, 3, 4, 5, 2, 3].mask] == [0, 0, 0, 1, 1, 0, 1]
    assert sum(merged[1, 2, 3, 4, 5, 7, 8, 9, 7, 4].mask) == 1  # what it goes on from is trained elsewhere
    assert {sample.shareable for sample in merged.values()} == {2}  # the prompt without its last token


def test_samples_that_no_other_goes_on_from_stay_as_they_are() -> None:
    samples = [turn([1, 2], [3]), turn([1, 2], [3, 4]), turn([1, 2], [3]), turn([2], [3])]
    assert merge_turns(samples) == samples  # 3 begins 3 4, but in the same turn
    assert merge_turns([]) == []


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_no_trained_token_is_lost_or_doubled(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    def tokens() -> list[int]:
        return [draw(3) for _ in range(draw(2))]

    samples = []
    for _, _ in itertools.product(range(draw(3)), range(2)):
        context = tokens()
        for _ in range(draw(3)):
            own = tokens()
            samples.append(turn(context, own, float(draw(9))))
            context = [*context, *own, *tokens()]
    merged = merge_turns(samples)
    assert len(merged) <= len(samples)
    assert trained(merged) == trained(samples)
    assert sum(sum(sample.values["advantages"]) for sample in merged) == pytest.approx(
        sum(sum(sample.values["advantages"]) for sample in samples)
    )
    for sample in merged:
        assert not any(sample.mask[: sample.shareable + 1])
