"""Device choices that are refused; CPU support does not change torch for other libraries."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

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


@no_cuda
def test_a_half_installed_transformer_engine_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its core wheel without the torch part: find_spec finds it, megatron-core does not import it."""
    choose_backend("auto", 0)  # imports megatron
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    try:
        with caplog.at_level(logging.WARNING):
            backend = choose_backend("cuda", 0)
    finally:
        sys.modules.pop("transformer_engine", None)
    assert (backend.name, backend.transformer_engine) == ("cuda", False)
    assert "cannot be used" in caplog.text
    assert "No module named 'transformer_engine.pytorch'" in caplog.text


@pytest.mark.parametrize("fused", [True, False])
def test_the_step_of_an_empty_adam_state_is_where_the_kernel_wants_it(fused: bool) -> None:
    """A checkpoint saved before the first step that was not skipped creates the state. The meta device stands for a
    GPU."""
    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0]["fused"] = fused
    cpu_support.create_empty_adam_state(SimpleNamespace(optimizer=optimizer))
    state = optimizer.state[weight]
    assert state["step"].device.type == ("meta" if fused else "cpu")
    assert state["exp_avg"].device.type == "meta"


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
