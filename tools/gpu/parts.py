"""The parts of tools/gpu_check.py: command, deadline, and what reads their results; in order of importance.

On a new machine every deadline is a guess. So they are generous, and add up to more than the whole check may take: a
part gets its own only as far as those behind it keep their least time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    least_s: float  # what parts before it must leave, if need be by an earlier end
    read: Callable[[Path], Reading]
    gpus: int = 1
    suffix: str = ".json"  # of the results
    by_default: bool = True  # else only if it is named


def pytest_part(
    name: str, deadline_s: float, least_s: float, *selection: str, gpus: int = 1, by_default: bool = True
) -> Part:
    """Tests of tests/gpu, whose own deadlines are shorter."""

    def argv(out: Path) -> list[str]:
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out}", *selection]

    return Part(name, argv, deadline_s, least_s, results.pytest_xml, gpus, ".xml", by_default)


def tool(
    name: str, deadline_s: float, least_s: float, read: Callable[[Path], Reading], script: str, *arguments: str
) -> Part:
    """A program of tools/ that writes its figures to --json."""
    return Part(name, lambda out: [str(TOOLS / script), *arguments, "--json", str(out)], deadline_s, least_s, read)


RANKS, ENGINE, TWO = "tests/gpu/test_ranks.py", "tests/gpu/test_engine.py", "tests/gpu/test_two_gpus.py"
SFT = "tests/gpu/test_runs.py::test_supervised_fine_tuning_in_bf16"


CPU_FACTOR = 2.0  # of the deadlines on a CPU
NO_GRAPHS = "--disable-cuda-graph"  # a first start then captures none; "RL steps" has them, as a run of a user


def parts(device: str, engine_args: str, out: Path) -> list[Part]:
    """All parts for a device; on the CPU in tiny shapes. out: the folder of this check."""
    on_gpu = device == "cuda"
    flags = f"--engine-args={engine_args}"  # one word: argparse takes a second one that begins with -- for an option
    quick = f"--engine-args={engine_args} {NO_GRAPHS}" if on_gpu else flags
    bench = ("--shapes", "qwen2.5-1.5b", "--repeats", "3") if on_gpu else ("--shapes", "tiny", "--repeats", "1")
    head = ("8192", "151936", "1536") if on_gpu else ("1024", "16384", "64")
    sync = ("--shapes", "135m", "1b", "--transports", "ipc") if on_gpu else ("--quick", "--transports", "ipc")
    known = [
        tool("environment", 90, 20, results.environment, "gpu/environment.py", "--device", device),
        pytest_part("layouts and state", 200, 70, RANKS, "-k", "layout- or state-"),
        pytest_part("engine", 240, 100, ENGINE),
        tool(
            *("RL steps", 260, 130, results.rl_steps, "gpu/rl_steps.py", "--device", device),
            *("--run-dir", str(out / "rl_steps"), flags),
        ),
        tool(
            *("MFU", 90, 45, results.train_step, "bench/train_step.py", "--dtypes", "bfloat16", "--only-masters"),
            *bench,
        ),
        tool(
            *("head", 30, 20, results.head, "bench/logprobs.py", "--dtypes", "bfloat16", "--device", device),
            *("--tokens", head[0], "--vocab", head[1], "--hidden", head[2]),
        ),
        tool("weight sync", 40, 25, results.weight_sync, "bench/weight_sync.py", *sync, "--repeats", "3", quick),
        pytest_part("SFT run", 150, 60, f"{SFT}[1]", by_default=False),
        pytest_part("two: layouts", 200, 100, RANKS, "-k", "two-", gpus=2),
        pytest_part("two: broadcast", 180, 120, TWO, "-k", "eleven", gpus=2),
        pytest_part("two: killed engine", 420, 300, TWO, "-k", "killed", gpus=2),
        pytest_part("two: SFT run", 120, 60, f"{SFT}[2]", gpus=2),
    ]
    return known if on_gpu else [replace(part, deadline_s=CPU_FACTOR * part.deadline_s) for part in known]
