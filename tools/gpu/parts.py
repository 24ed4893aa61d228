"""The parts of tools/gpu_check.py: command, deadline, and what reads their results; in order of importance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.gpu import results
from tools.gpu.results import Reading

TOOLS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """A child process that checks or measures one thing."""

    name: str
    argv: Callable[[Path], list[str]]  # arguments of Python, for the file that the results go to
    deadline_s: float
    read: Callable[[Path], Reading]
    gpus: int = 1
    suffix: str = ".json"  # of the results


def pytest_part(name: str, deadline_s: float, *selection: str, gpus: int = 1) -> Part:
    """Tests of tests/gpu, whose own deadlines are shorter."""

    def argv(out: Path) -> list[str]:
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out}", *selection]

    return Part(name, argv, deadline_s, results.pytest_xml, gpus, ".xml")


def tool(name: str, deadline_s: float, read: Callable[[Path], Reading], script: str, *arguments: str) -> Part:
    """A program of tools/ that writes its figures to --json."""
    return Part(name, lambda out: [str(TOOLS / script), *arguments, "--json", str(out)], deadline_s, read)


RANKS, ENGINE, TWO = "tests/gpu/test_ranks.py", "tests/gpu/test_engine.py", "tests/gpu/test_two_gpus.py"
SFT = "tests/gpu/test_runs.py::test_supervised_fine_tuning_in_bf16"


def parts(device: str, engine_args: str, out: Path) -> list[Part]:
    """All parts for a device; on the CPU in tiny shapes. out: the folder of this check."""
    on_gpu = device == "cuda"
    flags = ("--engine-args", engine_args)
    bench = ("--shapes", "qwen2.5-1.5b", "--repeats", "3") if on_gpu else ("--shapes", "tiny", "--repeats", "1")
    head = ("8192", "151936", "1536") if on_gpu else ("1024", "16384", "64")
    sync = ("--shapes", "135m", "1b", "--transports", "ipc") if on_gpu else ("--quick", "--transports", "ipc")
    return [
        tool("environment", 90, results.environment, "gpu/environment.py", "--device", device),
        pytest_part("layouts and state", 240, RANKS, "-k", "layout- or state-"),
        pytest_part("engine", 300, ENGINE),
        tool("MFU", 200, results.train_step, "bench/train_step.py", "--dtypes", "bfloat16", *bench),
        tool(
            *("head", 90, results.head, "bench/logprobs.py", "--dtypes", "bfloat16", "--device", device),
            *("--tokens", head[0], "--vocab", head[1], "--hidden", head[2]),
        ),
        tool(
            *("RL steps", 300, results.rl_steps, "gpu/rl_steps.py", "--device", device),
            *("--run-dir", str(out / "rl_steps"), *flags),
        ),
        tool("weight sync", 200, results.weight_sync, "bench/weight_sync.py", *sync, "--repeats", "3", *flags),
        pytest_part("SFT run", 150, f"{SFT}[1]"),
        pytest_part("two: layouts", 240, RANKS, "-k", "two-", gpus=2),
        pytest_part("two: broadcast", 300, TWO, "-k", "eleven", gpus=2),
        pytest_part("two: killed engine", 500, TWO, "-k", "killed", gpus=2),
        pytest_part("two: SFT run", 150, f"{SFT}[2]", gpus=2),
    ]
