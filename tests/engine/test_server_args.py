"""The command line of a server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.client import KEEPALIVE_S
from collab_megatron.engine.server_args import engine_command, nccl_settings


def value_of(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_cpu_takes_the_pure_torch_paths() -> None:
    section = EngineSection(max_total_tokens=64, tensor=2, extra_args=("--log-requests",))
    command = engine_command(section, model_path="m", dtype="float32", device="cpu", port=1234, seed=7)
    assert command.url == "http://127.0.0.1:1234"
    assert value_of(command.argv, "--attention-backend") == "torch_native"
    assert value_of(command.argv, "--max-total-tokens") == "64"
    assert value_of(command.argv, "--random-seed") == "7"
    assert command.argv[-1] == "--log-requests"
    assert float(command.env["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 10 * KEEPALIVE_S
    assert command.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert command.unset == ()


def test_gpu_leaves_the_choice_to_sglang() -> None:
    section = EngineSection(python="/opt/engine/bin/python", mem_fraction=0.8)
    command = engine_command(section, model_path="m", dtype="bfloat16", device="cuda", port=1, seed=1)
    assert command.argv[0] == "/opt/engine/bin/python"
    assert "--attention-backend" not in command.argv
    assert "SGLANG_USE_CPU_ENGINE" not in command.env
    assert value_of(command.argv, "--mem-fraction-static") == "0.8"
    # its environment is another one
    assert command.unset == ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    assert "--enable-memory-saver" not in command.argv


def test_a_server_on_a_gpu_finds_the_programs_of_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ninja, above all, although nobody has activated it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)  # an environment's interpreter is a link to its base's
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "executable", "/opt/trainer/bin/python")

    def path(python: str | None, device: str = "cuda") -> str | None:
        section = EngineSection(python=python)
        command = engine_command(section, model_path="m", dtype="bfloat16", device=device, port=1, seed=1)
        return command.env.get("PATH")

    assert path(str(tmp_path / "bin" / "python")) == os.pathsep.join((str(tmp_path / "bin"), "/usr/bin"))
    assert path(None) == os.pathsep.join(("/opt/trainer/bin", "/usr/bin"))
    assert path(None, device="cpu") is None
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert path("python") == os.pathsep.join((str(tmp_path / "bin"),) * 2)
    monkeypatch.delenv("PATH")
    assert path(None) == os.pathsep.join(("/opt/trainer/bin", os.defpath))


def test_threads_are_the_launchers_unless_the_config_says_otherwise() -> None:
    def threads(section: EngineSection) -> str:
        command = engine_command(section, model_path="m", dtype="float32", device="cpu", port=1, seed=1, threads=6)
        assert command.env["OMP_WAIT_POLICY"] == "PASSIVE"
        return command.env["OMP_NUM_THREADS"]

    assert threads(EngineSection()) == "6"
    assert threads(EngineSection(threads=3)) == "3"


def test_ranks_on_cpu_get_cores_that_exist_and_others_for_every_server() -> None:
    def bound(number: int, cores: list[int], tensor: int = 2) -> str:
        section = EngineSection(tensor=tensor, count=3)
        command = engine_command(
            section, model_path="m", dtype="float32", device="cpu", port=1, seed=1, number=number, cores=cores
        )
        return command.env.get("SGLANG_CPU_OMP_THREADS_BIND", "")

    assert [bound(number, [0, 1, 2, 3]) for number in range(3)] == ["0|1", "2|3", "0|1"]
    assert bound(1, [0, 1, 2]) == "2|0"
    assert bound(0, [5]) == "5|5"
    assert bound(0, [5], tensor=1) == ""  # nothing to bind: the scheduler chooses


def test_colocated_servers_give_their_memory_back() -> None:
    section = EngineSection(placement="colocated")
    command = engine_command(section, model_path="m", dtype="bfloat16", device="cuda", port=1, seed=1)
    assert "--enable-memory-saver" in command.argv
    on_cpu = engine_command(section, model_path="m", dtype="float32", device="cpu", port=1, seed=1)
    assert "--enable-memory-saver" not in on_cpu.argv  # nothing of it works without a GPU
    # a server that restarts finds GPUs that the trainer fills unequally
    assert command.env["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    apart = engine_command(EngineSection(), model_path="m", dtype="bfloat16", device="cuda", port=1, seed=1)
    assert "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK" not in apart.env


@pytest.mark.parametrize("flags", [(), ("--log-requests",), ("--decode-attention-backend=flex_attention",)])
def test_fp32_on_a_gpu_takes_a_backend_that_has_it(flags: tuple[str, ...]) -> None:
    section = EngineSection(extra_args=flags)
    command = engine_command(section, model_path="m", dtype="float32", device="cuda", port=1, seed=1)
    chosen = "--attention-backend" in command.argv
    assert chosen == (not any("attention" in flag for flag in flags))  # the user's choice stays
    assert not chosen or value_of(command.argv, "--attention-backend") == "triton"


def test_nccl_settings_are_those_that_sglang_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """srt/entrypoints/engine.py, _set_envs_and_config."""
    names = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")

    def settings(*flags: str, **inherited: str) -> tuple[str, ...]:
        found = nccl_settings(flags, inherited)
        return tuple(found[name] for name in names)

    assert settings() == ("0", "0")
    assert settings(NCCL_CUMEM_ENABLE="1") == ("1", "0")
    assert settings("--enable-nccl-nvls") == ("0", "1")
    assert settings("--enable-symm-mem", NCCL_CUMEM_ENABLE="0") == ("1", "1")  # the flag outranks the environment
    for name in names:
        monkeypatch.delenv(name, raising=False)
    engine = engine_command(EngineSection(), model_path="m", dtype="bfloat16", device="cuda", port=1, seed=1)
    assert {name: engine.env[name] for name in names} == nccl_settings((), {})
