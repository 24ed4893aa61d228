"""Which attention transformer-engine's layers get. Modules of its names stand in its place, with a given choice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from collab_megatron.trainer.actor.backend import Backend
from collab_megatron.trainer.local import layers, te_attention

CPU = torch.device("cpu")
BACKEND = Backend("cuda", CPU, "nccl", True, True, True, "transformer_engine")
ALONE = {"use_flash_attention": False, "use_fused_attention": False, "use_unfused_attention": True}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Put a transformer_engine there that chooses `chosen`, or raises `error`; the arguments it was asked with."""
    te_attention.is_fast.cache_clear()

    def install(chosen: dict[str, bool], error: str = "") -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        class DotProductAttention:
            def __init__(self, heads: int, size: int, **settings: Any) -> None:
                asked.append({"heads": heads, "size": size, **settings})

            def __call__(self, query: Tensor, key: Tensor, value: Tensor, **lengths: Any) -> Tensor:
                asked.append({"keys": key.shape, **lengths})
                if error:
                    raise RuntimeError(error)
                return query + (key.sum() + value.sum())

        attention: Any = ModuleType("transformer_engine.pytorch.attention")
        attention.DotProductAttention = DotProductAttention
        attention.dot_product_attention = SimpleNamespace(_attention_backends=chosen)
        monkeypatch.setitem(sys.modules, attention.__name__, attention)
        return asked

    return install


def config(**changes: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16}
    made = TransformerConfig(**sizes, params_dtype=torch.bfloat16)
    return cast(TransformerConfig, SimpleNamespace(**{**vars(made), **changes}))


def core_attention(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> object:
    """The class that the layers get; "its own" if it is transformer-engine's."""
    attention = SimpleNamespace(submodules=SimpleNamespace(core_attention="its own"))
    spec = SimpleNamespace(submodules=SimpleNamespace(self_attention=attention))
    monkeypatch.setattr(layers, "get_gpt_layer_with_transformer_engine_spec", lambda **_: spec)
    assert cast(Any, layers.layer_spec(config(**changes), BACKEND, None)) is spec
    return attention.submodules.core_attention


@pytest.mark.parametrize("fast", ["use_flash_attention", "use_fused_attention"])
def test_a_fast_attention_is_kept(engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fast: str) -> None:
    asked = engine({**ALONE, fast: True})
    assert core_attention(monkeypatch, tensor_model_parallel_size=2, window_size=(63, 0)) == "its own"
    of_a_rank = {"heads": 4, "size": 16, "num_gqa_groups": 2, "window_size": (63, 0)}
    assert of_a_rank.items() <= asked[0].items()
    assert asked[1]["keys"] == (2048, 2, 16)
    assert asked[1]["cu_seqlens_q"].tolist() == [0, 1500, 2048]


def test_without_one_the_layers_get_torchs(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = engine(ALONE)
    with caplog.at_level(logging.WARNING):
        assert core_attention(monkeypatch) is layers.SdpaAttention
        assert core_attention(monkeypatch) is layers.SdpaAttention
    assert caplog.text.count("attention is torch's, not transformer-engine's: it has no flash or fused one") == 1
    assert len(asked) == 2  # asked once


def test_one_that_fails_is_not_used_and_the_reason_is_logged(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine(ALONE, error="cuDNN has no such graph\nand more")
    with caplog.at_level(logging.WARNING):
        assert core_attention(monkeypatch) is layers.SdpaAttention
    assert "it failed: RuntimeError: cuDNN has no such graph" in caplog.text
    assert "and more" not in caplog.text


def test_a_model_of_shapes_only_asks_nobody(engine: Callable[..., Any]) -> None:
    asked = engine(ALONE)
    assert te_attention.is_fast(torch.device("meta"), torch.bfloat16, (8, 4, 16), None)
    assert asked == []


def test_context_parallelism_has_only_transformer_engines(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = engine(ALONE)
    assert core_attention(monkeypatch, context_parallel_size=2) == "its own"
    assert asked == []
