"""What only GPUs use (compiled kernels, attention over a packed row), on a CPU with stand-ins for the compiled part.

The stand-in of the compiler is torch's `aot_eager`: the same capture and gradients, without generated code.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from collab_megatron.trainer.batching.micro_batch import PackedGroup
from collab_megatron.trainer.local import compiled, kernels, varlen
from collab_megatron.trainer.local.layers import Packing, SdpaAttention

CPU = torch.device("cpu")


def of_kernels(name: str) -> Any:
    """The hand-written function."""
    return {
        "rms_norm": kernels._RmsNorm.apply,
        "rope": lambda x, cos, sin: kernels._Rope.apply(x, cos, sin),
        "swiglu": kernels._SwiGlu.apply,
    }[name]


@pytest.mark.parametrize("name", list(compiled.TRIALS))
def test_the_compiled_functions_are_the_hand_written_ones(name: str) -> None:
    """Results and gradients; in bf16 a rounding apart."""
    plain, shapes, others = compiled.TRIALS[name]
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        torch.manual_seed(0)
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        found = []
        for function in (plain, of_kernels(name)):
            inputs = [tensor.clone() for tensor in tensors]
            wanted = inputs if name != "rope" else inputs[:1]  # angles have no gradient
            for tensor in wanted:
                tensor.requires_grad_()
            out = function(*inputs, *others)
            gradients = torch.autograd.grad(out.float().sum(), wanted)
            found.append((out, *gradients))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=bound, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(compiled.TRIALS))
def test_other_lengths_compile_nothing_again(name: str) -> None:
    _, shapes, others = compiled.TRIALS[name]
    torch._dynamo.reset()
    fast = compiled.compiled.__wrapped__(name, CPU, "aot_eager")
    assert fast is not None
    for length in (6, 9, 14):
        long = [torch.randn(length, *shape[1:]) if len(shape) > 1 else torch.randn(shape) for shape in shapes]
        with torch._dynamo.config.patch(error_on_recompile=length == 14):
            torch.testing.assert_close(fast(*long, *others), compiled.TRIALS[name][0](*long, *others))


@pytest.mark.parametrize("outcome", ["raises", "differs"])
def test_what_does_not_work_is_not_used(
    outcome: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def trial(*_: Any, **__: Any) -> float:
        if outcome == "raises":
            raise RuntimeError("no compiler\nmore of it")
        return float("nan")

    monkeypatch.setattr(compiled, "_difference", trial)
    monkeypatch.setattr(varlen, "difference", trial)
    varlen_module = SimpleNamespace(varlen_attn=fake_varlen)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", cast(Any, varlen_module))
    cuda = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        assert compiled.compiled.__wrapped__("swiglu", CPU) is None
        assert not varlen.usable.__wrapped__(cuda, torch.bfloat16, 64, False)
    assert len(caplog.records) == 2
    assert "more of it" not in caplog.text


def fake_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch 2.13 documents of varlen_attn, without a GPU."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    ends = cu_seq_q.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    assert max(lengths) == max_q == max_k
    left, right = window_size
    assert right == 0
    outs = []
    for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in parts)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def as_flash(query: Tensor, key: Tensor, value: Tensor, *rest: Any, enable_gqa: bool, **others: Any) -> Tensor:
    """fake_varlen with a copy of keys and values for each query head: flash's gradients of shared heads are rounded for
    each query head, then added."""
    assert enable_gqa
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return fake_varlen(query, key, value, *rest, **others)


def changed(**arguments: Any) -> Callable[..., Tensor]:
    return lambda *args, **given: fake_varlen(*args, **{**given, **arguments})


def unmasked(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float, **__: Any) -> Tensor:
    """Sees what comes after a token, and the other sequence."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("windowed", [False, True])
def test_the_trial_takes_roundings_and_refuses_other_attention(
    windowed: bool, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(attention: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> float:
        module = SimpleNamespace(varlen_attn=attention)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", cast(Any, module))
        return varlen.difference(CPU, dtype, head_dim, windowed=windowed)

    assert differs(as_flash, torch.float32) < 1e-5
    for attention in (fake_varlen, as_flash):
        assert 1e-3 < differs(attention) < varlen.BOUND / 2
    wrong = {
        "scale": changed(scale=None),
        "a tenth": changed(scale=0.55 * head_dim**-0.5),
        "window": changed(window_size=(-1, 0) if windowed else (2, 0)),
        "window, one off": changed(window_size=(2 if windowed else 3, 0)),
        "mask": unmasked,
        "nan": lambda *args, **given: fake_varlen(*args, **given) * float("nan"),
    }
    assert [name for name, attention in wrong.items() if differs(attention) < varlen.BOUND] == []


@pytest.mark.parametrize("window", [None, (2, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_packed_row_is_one_call_unless_it_shares_a_prompt(
    window: tuple[int, int] | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = (PackedGroup(3, (2, 4)), PackedGroup(0, (5,))) if shared else (PackedGroup(0, (9,)), PackedGroup(0, (5,)))
    packing = Packing.of(groups, CPU)
    attention = SdpaAttention(cast(Any, SimpleNamespace(window_size=window)), softmax_scale=0.3)
    torch.manual_seed(0)
    qkv = [torch.randn(14, heads, 8) for heads in (4, 2, 2)]
    wanted = attention(*qkv, packed_seq_params=packing)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fake_varlen(*args, **kwargs)

    module = SimpleNamespace(varlen_attn=counted)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", cast(Any, module))
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    torch.testing.assert_close(attention(*qkv, packed_seq_params=packing), wanted)
    assert len(calls) == (not shared)


def test_a_cpu_and_fp32_have_a_call_per_sequence() -> None:
    assert not varlen.usable(CPU, torch.bfloat16, 64, False)
    assert not varlen.usable(torch.device("cuda", 0), torch.float32, 64, False)
