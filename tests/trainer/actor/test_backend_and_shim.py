"""Device choices that are refused; CPU support does not change torch for other libraries."""

from __future__ import annotations

import pytest
import torch

from collab_megatron.errors import UserError
from collab_megatron.trainer.actor.backend import choose_backend
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
