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
