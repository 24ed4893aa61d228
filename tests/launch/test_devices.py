"""Devices of a run: which GPUs the engines get, and cpu or cuda for the trainer, decided once by the launcher."""

from __future__ import annotations

import pytest
import torch

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import UserError
from collab_megatron.launch import run_processes
from collab_megatron.launch.run_processes import engine_gpus, on_chosen_device
from collab_megatron.trainer.actor.backend import choose_backend
from tests.conftest import REPOSITORY


def load(*overrides: str) -> RLConfig:
    return load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", overrides)


def test_engines_use_gpus_of_their_own_or_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert engine_gpus(load("parallel.device=cuda")) == ["6", "7"]
    assert engine_gpus(load("parallel.device=cuda", "engine.placement=colocated")) == ["4", "5", "6", "7"]
    assert engine_gpus(load("parallel.device=cpu")) is None


def test_the_device_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks read the launcher's choice in their config, and torch must agree with it."""
    for found in ("cuda", "cpu"):
        monkeypatch.setattr(run_processes, "device_of", lambda parallel, found=found: found)
        assert on_chosen_device(load()).parallel.device == found
    monkeypatch.undo()
    assert on_chosen_device(load("parallel.device=cpu")).parallel.device == "cpu"
    with pytest.raises(
        UserError, match=r"torch finds no CUDA device: .* or set parallel.device=cpu to train on the CPU"
    ):
        choose_backend("cuda", 0)  # a GPU without a driver or a torch for it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"found no GPU\), but torch finds CUDA devices"):
        choose_backend("cpu", 0)
