"""Device choices that are refused; CPU support does not change torch for other libraries."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from collab_megatron.errors import UserError
from collab_megatron.trainer.actor.backend import choose_backend
from collab_megatron.trainer.actor.policy_model import output_layer_without_apex
from collab_megatron.trainer.local import cpu_support

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@no_cuda
def test_cpu_is_chosen_and_cuda_refused() -> None:
    backend = choose_backend("auto", 0)
    assert (backend.name, backend.process_group, backend.device) == ("cpu", "gloo", torch.device("cpu"))
    with pytest.raises(UserError, match="finds no CUDA device"):
        choose_backend("cuda", 0)


@no_cuda
def test_the_shim_is_invisible_outside_megatron() -> None:
    assert cpu_support.install() is True
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert not torch.cuda.is_available()
    with torch.device("meta"):  # what transformers' from_pretrained relies on
        assert torch.empty(3).device.type == "meta"
        assert torch.ones(3).device.type == "meta"
    assert torch.arange(3).to("meta").device.type == "meta"


def test_the_shim_does_nothing_where_cuda_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.zeros
    assert cpu_support.install.__wrapped__() is False
    assert torch.zeros is before


def test_the_output_layer_is_built_with_fused_gradients_and_without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformer-engine's layers need no apex, and megatron's own output layer is never called."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
        perform_initialization=False,
    )

    def build() -> None:
        layers.ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False)

    with pytest.raises(RuntimeError, match="APEX"):
        build()
    with output_layer_without_apex():
        build()
    assert not layers._grad_accum_fusion_available
