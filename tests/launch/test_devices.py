"""Devices of a run: which GPUs the engines get, and cpu or cuda for the trainer, decided once by the launcher."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from collab_megatron.config import RLConfig, load_config
from collab_megatron.demo.pipeline import DemoPipeline, DemoSettings
from collab_megatron.engine.server_args import engine_command
from collab_megatron.errors import UserError
from collab_megatron.launch import machine_checks, node, run_processes
from collab_megatron.launch.machine_checks import check_gpus
from collab_megatron.launch.node import device_of, has_gpu_packages, this_node, visible_gpus
from collab_megatron.launch.run_processes import on_chosen_device, trainer_env
from collab_megatron.launch.site import OneNode, child_env, engine_gpus
from collab_megatron.launch.supervisor import Supervisor
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


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a driver and two GPUs."""
    for name in ("nvidiactl", "nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    monkeypatch.setattr(node, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("driver")
def test_auto_is_the_cpu_in_an_environment_without_gpu_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = load().parallel
    monkeypatch.setattr(node, "has_gpu_packages", lambda: False)
    assert visible_gpus() == ["0", "1"]
    assert device_of(parallel) == "cpu"
    assert "this environment has no GPU packages" in this_node().chosen(parallel)
    monkeypatch.setattr(node, "has_gpu_packages", lambda: True)
    assert device_of(parallel) == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_of(parallel) == "cpu"
    assert "no GPU found" in this_node().chosen(parallel)


def test_the_gpu_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CUDA build of torch is not enough: tools/install.sh falls back to it, with a stand-in for SGLang's kernels."""
    assert has_gpu_packages() == (torch.version.cuda is not None and node._is_installed("sglang-kernel"))
    version, installed = tmp_path / "version.py", {"sglang-cpu-support"}
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(node, "_is_installed", installed.__contains__)
    version.write_text("cuda: Optional[str] = '13.0'\n")
    assert not has_gpu_packages()
    installed.add("sglang-kernel")
    assert has_gpu_packages()
    installed.clear()  # an environment of the trainer alone
    assert has_gpu_packages()
    version.write_text("cuda: Optional[str] = None\n")
    assert not has_gpu_packages()


@pytest.mark.parametrize(("given", "there"), [("1,0", ["1", "0"]), ("0,-1,1", ["0"]), ("-1", []), ("", [])])
def test_ids_end_where_cuda_ends_them(monkeypatch: pytest.MonkeyPatch, given: str, there: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == there


def test_every_process_of_a_cpu_run_sees_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config = load("parallel.device=cpu", f"run.dir={tmp_path}")
    rank = OneNode(config).rank_env(0)
    engine = engine_command(config.engine, model_path="m", dtype="float32", device="cpu", port=1, seed=1).env
    assert rank["CUDA_VISIBLE_DEVICES"] == engine["CUDA_VISIBLE_DEVICES"] == ""
    with Supervisor(tmp_path / "logs", env=child_env(config)) as supervisor:
        child = supervisor.start("any", ["sh", "-c", 'echo "gpus: [$CUDA_VISIBLE_DEVICES]"'], {}, show=True)
        supervisor.wait_for([child], timeout_s=10)
    assert "gpus: []" in capfd.readouterr().out
    assert child_env(load("parallel.device=cuda")) == {}


def test_the_demo_is_a_cpu_run_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen: list[str | None] = []
    monkeypatch.setattr(
        "collab_megatron.demo.pipeline._call", lambda argv, folder, env: seen.append(env.get("CUDA_VISIBLE_DEVICES"))
    )
    DemoPipeline(DemoSettings(tmp_path), tmp_path).stage("model", [])
    on_gpu = DemoPipeline(DemoSettings(tmp_path, device="cuda"), tmp_path)
    on_gpu.stage("model", [])
    assert seen == ["", "0"]
    config = load(*on_gpu.extra_overrides("rl"))
    assert (config.parallel.device, config.parallel.world_size, config.engine.placement) == ("cuda", 1, "colocated")


def test_ranks_on_gpus_have_the_servers_nccl_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that join one communicator must agree; the weight sync's holds trainer and engine ranks."""
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.delenv(name, raising=False)
    config = load("parallel.device=cuda", "parallel.tensor=1")
    engine = engine_command(config.engine, model_path="m", dtype="bfloat16", device="cuda", port=1, seed=1).env
    assert trainer_env(config) == {name: engine[name] for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")}
    assert trainer_env(load("parallel.device=cpu")) == {}
    assert trainer_env(load("parallel.device=cuda", "parallel.tensor=1", "engine.placement=colocated")) == {}  # ipc
    assert trainer_env(load("parallel.device=cuda"))["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"  # tensor parallel
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert trainer_env(load("parallel.device=cuda"))["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


@pytest.mark.usefixtures("driver")
def test_cuda_in_an_environment_without_gpu_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = load("parallel.device=cuda").parallel
    monkeypatch.setattr(machine_checks, "has_gpu_packages", lambda: False)
    with pytest.raises(UserError, match=r"this environment has no GPU packages .* or set parallel\.device=cpu"):
        check_gpus(parallel, 2, this_node())
    monkeypatch.setattr(machine_checks, "has_gpu_packages", lambda: True)
    check_gpus(parallel, 2, this_node())
