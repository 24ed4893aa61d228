"""The output head against torch's own log_softmax; two real ranks are checked in tests/parallel.

Bounds: float64 1e-12 of the plain head; float32 1e-5; kept against recomputed 1e-6; bfloat16 as said in its test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from collab_megatron.model import memory
from collab_megatron.trainer.actor import logprobs as head
from collab_megatron.trainer.actor.logprobs import head_logprobs

N, H, ROWS = 21, 16, 40
ONE_CHUNK, MANY_CHUNKS = 10**9, 7 * 4 * N  # the second: seven columns at a time, the last tile narrower


def _inputs(
    dtype: torch.dtype, vocab: int, scale: float = 1.0, *, tokens: int = N, width: int = H
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight (both with gradient), labels, and a weight for each token's log-probability."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[0], labels[1] = vocab - 1, 0
    return hidden, weight, labels, torch.randn(tokens, generator=generator, dtype=torch.float64)


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Log-probability of the label and entropy by torch's log_softmax of the whole row."""
    every = torch.log_softmax((hidden @ weight.t())[:, :vocab], dim=-1)
    return every.gather(1, labels[:, None])[:, 0], -(every.exp() * every).sum(-1)


def _ours_and_plain(
    dtype: torch.dtype, chunk_bytes: int, vocab: int, scale: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """(ours, in float64 by plain torch) of log-probability, entropy, gradient of hidden, gradient of weight."""
    hidden, weight, labels, token_weight = _inputs(dtype, vocab, scale)
    logprobs, entropy = head_logprobs(hidden, weight, labels, vocab=vocab, chunk_bytes=chunk_bytes)
    (logprobs * token_weight).sum().backward()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted, wanted_entropy = _plain(exact[0], exact[1], labels, vocab)
    (wanted * token_weight).sum().backward()
    ours = (logprobs, entropy, hidden.grad, weight.grad)
    return list(zip(ours, (wanted, wanted_entropy, exact[0].grad, exact[1].grad), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, MANY_CHUNKS])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_temperature_divides_the_logits(
    dtype: torch.dtype, bound: float, temperature: float, chunk_bytes: int
) -> None:
    hidden, weight, labels, token_weight = _inputs(dtype, 33, 1.0)
    ours = head_logprobs(hidden, weight, labels, vocab=33, chunk_bytes=chunk_bytes, temperature=temperature)
    (ours[0] * token_weight).sum().backward()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    plain = _plain(exact[0] / temperature, exact[1], labels, 33)
    (plain[0] * token_weight).sum().backward()
    pairs = (*zip(ours, plain, strict=True), (hidden.grad, exact[0].grad), (weight.grad, exact[1].grad))
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, MANY_CHUNKS, 1])
@pytest.mark.parametrize("vocab", [ROWS, 33])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients(dtype: torch.dtype, bound: float, vocab: int, chunk_bytes: int) -> None:
    """Also where the vocabulary is cut off by padding, and where a tile is a single column."""
    pairs = _ours_and_plain(dtype, chunk_bytes, vocab)
    for ours, plain in pairs:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), plain, rtol=bound, atol=bound)
    weight_grad = pairs[3][0]
    assert not weight_grad[vocab:].any()


def test_gradcheck() -> None:
    hidden, weight, labels, _ = _inputs(torch.float64, 33, tokens=5, width=6)

    def logprobs(*inputs: Tensor) -> Tensor:
        return head_logprobs(inputs[0], inputs[1], labels, vocab=33, chunk_bytes=7 * 4 * len(labels))[0]

    assert torch.autograd.gradcheck(logprobs, (hidden, weight))


@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, MANY_CHUNKS, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_an_entropy_with_gradient(dtype: torch.dtype, bound: float, temperature: float, chunk_bytes: int) -> None:
    """Of a sum of log-probs and entropies with weights of their own, for an entropy bonus."""
    hidden, weight, labels, token_weight = _inputs(dtype, 33)
    ours = head_logprobs(
        hidden, weight, labels, vocab=33, chunk_bytes=chunk_bytes, temperature=temperature, entropy_gradient=True
    )
    (ours[0] * token_weight + ours[1] * token_weight.flip(0)).sum().backward()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    plain = _plain(exact[0] / temperature, exact[1], labels, 33)
    (plain[0] * token_weight + plain[1] * token_weight.flip(0)).sum().backward()
    pairs = (*zip(ours, plain, strict=True), (hidden.grad, exact[0].grad), (weight.grad, exact[1].grad))
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)
    assert weight.grad is not None
    assert not weight.grad[33:].any()


@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, MANY_CHUNKS])
def test_bf16_is_as_close_as_a_plain_bf16_head(chunk_bytes: int) -> None:
    """Statistics in fp32 of logits rounded to bf16: at most 2**-9 of the greatest logit (about 15 here) off; gradients
    at most 1.5 times as far from exact as those of plain torch in bf16, in the root mean square.
    """
    hidden, weight, labels, token_weight = _inputs(torch.bfloat16, 33)
    pairs = _ours_and_plain(torch.bfloat16, chunk_bytes, 33)
    torch.testing.assert_close(pairs[0][0].double(), pairs[0][1], rtol=0, atol=15 * 2**-8)
    torch.testing.assert_close(pairs[1][0].double(), pairs[1][1], rtol=0, atol=15 * 2**-8)
    every = (hidden @ weight.t())[:, :33].float().log_softmax(-1)
    (every.gather(1, labels[:, None])[:, 0] * token_weight).sum().backward()
    for (ours, exact), plain in zip(pairs[2:], (hidden.grad, weight.grad), strict=True):
        assert plain is not None
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() <= 1.5 * (plain.double() - exact).norm()


def test_gradient_of_a_sure_token_in_bf16() -> None:
    """Of "probability - 1" there remains 5e-5 here: taken after rounding to bf16 it would be lost in 2**-9.

    What is left of error is fp32's own, of a log-normalizer of 10.
    """
    hidden = torch.eye(2, dtype=torch.bfloat16)[:1].requires_grad_()
    weight = torch.tensor([[10.0, 3.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    head_logprobs(hidden, weight, torch.tensor([0]), vocab=2, chunk_bytes=ONE_CHUNK)[0].sum().backward()
    other = torch.sigmoid(torch.tensor(-10.0))  # the probability of the other token
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float(), other * torch.tensor([[10.0, 2.0]]), rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_and_many_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32: 1e-6 of each other. bf16: same statistics; gradients differ by how partial sums are rounded.

    With the same tiles, kept and recomputed are equal to the last bit.
    """
    pairs = [_ours_and_plain(dtype, chunk_bytes, 33) for chunk_bytes in (ONE_CHUNK, MANY_CHUNKS)]
    for (one, _), (many, _) in zip(*pairs, strict=True):
        exact = dtype == torch.float32 or one.dtype == torch.float32
        torch.testing.assert_close(one, many, rtol=1e-6 if exact else 2**-6, atol=2e-6 if exact else 0.03)
    monkeypatch.setattr(memory, "TILE_COLUMNS", 7)
    monkeypatch.setitem(memory.TILE_BYTES, "cpu", 0)
    for (kept, _), (again, _) in zip(_ours_and_plain(dtype, ONE_CHUNK, 33), pairs[1], strict=True):
        assert torch.equal(kept, again)


def test_inputs_are_left_alone_and_only_what_is_wanted_is_computed() -> None:
    hidden, weight, labels, _ = _inputs(torch.float32, 33)
    before = [x.detach().clone() for x in (hidden, weight, labels)]
    logprobs, entropy = head_logprobs(hidden, weight.detach(), labels, vocab=33, chunk_bytes=ONE_CHUNK)
    assert not entropy.requires_grad
    logprobs.sum().backward(retain_graph=True)
    once = hidden.grad
    assert once is not None
    (twice,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert torch.equal(once, twice)
    unwanted = weight.grad
    assert unwanted is None
    head_logprobs(hidden.detach(), weight, labels, vocab=33, chunk_bytes=1)[0].sum().backward()
    assert weight.grad is not None
    assert all(torch.equal(x, old) for x, old in zip((hidden, weight, labels), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, 4])
def test_huge_logits_stay_finite(chunk_bytes: int, dtype: torch.dtype) -> None:
    """A label whose tile holds e**-16384 of the probability: its gradient is right all the same.

    What such a tile adds of its own is below 1e-15 of the logit.
    """
    hidden = torch.tensor([[8192.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype, requires_grad=True)
    logprobs, entropy = head_logprobs(hidden, weight, torch.tensor([1]), vocab=3, chunk_bytes=chunk_bytes)
    logprobs.sum().backward()
    assert logprobs.item() == -16384
    assert entropy.item() == pytest.approx(0.0, abs=1e-6)
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(hidden.grad.float(), torch.tensor([[-2.0]]), rtol=2**-8, atol=0)
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[-8192.0], [8192.0], [0.0]]), rtol=2**-7, atol=1e-11)


def test_a_rank_of_padding_only_still_has_a_backward_pass() -> None:
    hidden, weight, labels, _ = _inputs(torch.float32, 33)
    logprobs, entropy = head_logprobs(hidden, weight, labels, vocab=33, tp_rank=1, chunk_bytes=ONE_CHUNK)
    logprobs.sum().backward()
    assert logprobs.isfinite().all()
    assert entropy.isfinite().all()
    for grad in (hidden.grad, weight.grad):
        assert grad is not None
        assert not grad.any()


def test_no_tokens() -> None:
    hidden, weight, labels, _ = _inputs(torch.float32, 33)
    logprobs, entropy = head_logprobs(hidden[:0], weight, labels[:0], vocab=33, chunk_bytes=MANY_CHUNKS)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("vocab", [33, 20, 18])
def test_two_ranks_simulated(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves of the rows, each with the all-gather's answer of both; with 20 rows the second is padding only.

    Values equal the plain head's on both ranks; the parts of hidden's gradient sum to the whole, as the caller's
    all-reduce will do.
    """
    hidden, weight, labels, token_weight = _inputs(torch.float64, vocab)
    halves = weight.detach().chunk(2)
    sent: list[Tensor] = []  # by rank 0, by rank 1, then the same again

    def all_gather(shards: list[Tensor], mine: Tensor, group: Any) -> None:
        sent.append(mine.clone())
        for shard, first_sent in zip(shards, sent, strict=False):
            shard.copy_(first_sent)

    monkeypatch.setattr(head.dist, "all_gather", all_gather)
    monkeypatch.setattr(head.dist, "get_world_size", lambda group: 2)
    parts = []
    for rank in (0, 1, 0, 1):  # the first round only to learn what each sends
        mine = hidden.detach().clone().requires_grad_()
        half = halves[rank].detach().clone().requires_grad_()
        logprobs, entropy = head_logprobs(
            mine,
            half,
            labels,
            vocab=vocab,
            tp_rank=rank,
            group=object(),  # type: ignore[arg-type]
            chunk_bytes=MANY_CHUNKS,
        )
        (logprobs * token_weight).sum().backward()
        assert mine.grad is not None
        assert half.grad is not None
        parts.append((logprobs, entropy, mine.grad, half.grad))
    assert len(sent) == 4  # one collective per forward pass, none in the backward pass
    first, second = parts[2:]

    wanted, wanted_entropy = _plain(hidden, weight, labels, vocab)
    (wanted * token_weight).sum().backward()
    for logprobs, entropy, _, _ in (first, second):
        torch.testing.assert_close(logprobs, wanted)
        torch.testing.assert_close(entropy, wanted_entropy)
    torch.testing.assert_close(first[2] + second[2], hidden.grad)
    torch.testing.assert_close(torch.cat([first[3], second[3]]), weight.grad)


@pytest.mark.parametrize("chunk_bytes, kept", [(ONE_CHUNK, 1), (MANY_CHUNKS, 0)])
def test_what_is_saved_for_the_backward_pass(chunk_bytes: int, kept: int) -> None:
    """Softmax only in one chunk; nothing at all without gradient."""
    hidden, weight, labels, _ = _inputs(torch.float32, 33)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        head_logprobs(hidden, weight, labels, vocab=33, chunk_bytes=chunk_bytes)
        assert sum(x.shape == (N, 33) for x in saved) == kept
        assert sum(x.numel() for x in saved) < weight.numel() + N * (33 * kept + H + 20)
        saved.clear()
        with torch.no_grad():
            logprobs, _ = head_logprobs(hidden, weight, labels, vocab=33, chunk_bytes=chunk_bytes)
        head_logprobs(hidden.detach(), weight.detach(), labels, vocab=33, chunk_bytes=chunk_bytes)
    assert not saved
    assert logprobs.grad_fn is None


def test_refusals() -> None:
    hidden, weight, labels, _ = _inputs(torch.float32, 33)
    with pytest.raises(ValueError, match="one dtype"):
        head_logprobs(hidden.bfloat16(), weight, labels, vocab=33, chunk_bytes=1)
    with pytest.raises(ValueError, match="one dtype"):
        head_logprobs(hidden[:, 1:], weight, labels, vocab=33, chunk_bytes=1)
    with pytest.raises(ValueError, match="one for each"):
        head_logprobs(hidden, weight, labels[1:], vocab=33, chunk_bytes=1)
