"""The command line of a server."""

from __future__ import annotations

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import engine_command


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
    assert command.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert command.env["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"


def test_gpu_leaves_the_choice_to_sglang() -> None:
    section = EngineSection(python="/opt/engine/bin/python", mem_fraction=0.8)
    command = engine_command(section, model_path="m", dtype="bfloat16", device="cuda", port=1, seed=1)
    assert command.argv[0] == "/opt/engine/bin/python"
    assert "--attention-backend" not in command.argv
    assert "SGLANG_USE_CPU_ENGINE" not in command.env
    assert value_of(command.argv, "--mem-fraction-static") == "0.8"
