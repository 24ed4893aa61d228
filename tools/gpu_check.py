"""One command for a machine with GPUs: what works there, and how fast. Stops after at most ten minutes on one GPU.

    python tools/gpu_check.py [--out DIR] [--parts NAME ...] [--engine-args FLAGS]
    python tools/gpu_check.py --device cpu      # the same programs in tiny shapes, to try them without a GPU

Each part is a child process with its own deadline; one that fails or hangs does not stop the rest, and leaves each of
them the least time that it needs. The table goes to the terminal, everything to OUT/gpu_check.json after each part, and
each part's output to OUT/logs. Parts for two GPUs run where there are two; "SFT run" only if it is named. Ends with 1
if a part failed.

Without flash-attention 3 or flashinfer: --engine-args="--attention-backend triton --sampling-backend pytorch".
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a file, Python finds only tools/

from collab_megatron.errors import EXIT_RUN, UserError, run_cli  # noqa: E402
from collab_megatron.files import publish_json  # noqa: E402
from collab_megatron.launch.child_process import ChildProcess  # noqa: E402
from collab_megatron.launch.node import visible_gpus  # noqa: E402
from collab_megatron.launch.supervisor import Supervisor  # noqa: E402
from tools.gpu.parts import Part, parts  # noqa: E402

LIMIT_S = {1: 560.0, 2: 1500.0}  # of all parts and their ends, by the number of GPUs that they use
SHORTEST_S = 10.0  # with less time left a part is not started
END_S = 15.0  # between TERM and KILL: servers need up to nine seconds
WELL = ("ok", "skipped")


@dataclass(frozen=True)
class Outcome:
    """What came of one part."""

    part: str
    status: str  # ok | failed | timeout | skipped | no time
    seconds: float
    summary: str
    figures: Any = field(default_factory=dict)
    log: str = ""


def room_s(left_s: float, later: Sequence[Part], gpus: int) -> float:
    """Seconds of `left_s` that a part may take, so that it and those that come later can end in time, even by force."""
    return left_s - END_S - sum(part.least_s + END_S for part in later if part.gpus <= gpus)


def run_part(part: Part, supervisor: Supervisor, out: Path, env: Mapping[str, str], deadline_s: float) -> Outcome:
    """Run a part to its end or its deadline, and read what it left, whatever its end was."""
    name = part.name.replace(":", "").replace(" ", "_")
    result = out / "results" / f"{name}{part.suffix}"
    result.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    env = {**env, "COLLAB_MEGATRON_GPU_PART_S": f"{deadline_s:.0f}"}  # tests/gpu/device.py
    child = supervisor.start(name, [sys.executable, *part.argv(result)], env, essential=False)
    try:
        child.process.wait(deadline_s)
        status = "failed" if child.process.returncode else "ok"
        summary = f"{child.ended()}: {last_line(child.log)}" if child.process.returncode else ""
    except subprocess.TimeoutExpired:
        status, summary = "timeout", f"did not end within {deadline_s:.0f} s: {last_line(child.log)}"
        end(child, supervisor)
    supervisor.kill(child)  # what it may have left of its process group
    seconds = time.monotonic() - start
    try:
        reading = part.read(result)
    except (OSError, ValueError, KeyError, IndexError, TypeError, ParseError) as error:
        if status == "ok":
            status, summary = "failed", f"its results cannot be read: {type(error).__name__}: {error}"
        return Outcome(part.name, status, seconds, summary, log=str(child.log))
    if status == "ok" and reading.nothing_ran:
        status = "skipped"
    summary = "; ".join(filter(None, (reading.summary, summary)))
    return Outcome(part.name, status, seconds, summary, reading.figures, str(child.log))


def end(child: ChildProcess, supervisor: Supervisor) -> None:
    """TERM, so that the part ends its own children, and KILL if it does not."""
    supervisor.terminate(child)
    try:
        child.process.wait(END_S)
    except subprocess.TimeoutExpired:
        supervisor.kill(child)
        child.process.wait()


def last_line(log: Path | None) -> str:
    """The error sentence in a log, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1][:300]


def check(chosen: Sequence[Part], out: Path, *, gpus: int, limit_s: float, env: Mapping[str, str]) -> list[Outcome]:
    """Run the parts one after the other; the table so far is printed and written after each."""
    start = time.monotonic()
    outcomes: list[Outcome] = []
    with Supervisor(out / "logs") as supervisor:
        for number, part in enumerate(chosen, start=1):
            left = room_s(limit_s - (time.monotonic() - start), chosen[number:], gpus)
            if gpus < part.gpus:
                outcome = Outcome(part.name, "skipped", 0.0, f"needs {part.gpus} GPUs, {gpus} are visible")
            elif left < SHORTEST_S:
                outcome = Outcome(
                    part.name, "no time", 0.0, f"{max(left, 0.0):.0f} of {limit_s:.0f} s were left for it"
                )
            else:
                outcome = run_part(part, supervisor, out, env, min(part.deadline_s, left))
            outcomes.append(outcome)
            print(line(outcome), flush=True)
            report = {
                "when": time.strftime("%Y-%m-%d %H:%M:%S"),
                "gpus": gpus,
                "limit_s": limit_s,
                "seconds": round(time.monotonic() - start, 1),
                "parts": [asdict(one) for one in outcomes],
            }
            publish_json(out / "gpu_check.json", report)
    return outcomes


def line(outcome: Outcome) -> str:
    return f"{outcome.part:18s} {outcome.status:8s} {outcome.seconds:6.1f} s  {outcome.summary}"


def bytecode_cache(environ: Mapping[str, str], out: Path) -> dict[str, str]:
    """Where Python keeps compiled modules although the machine forbids it, as images do: each of the parts' processes
    would compile torch, transformers and SGLang itself, 20 s on an H100 machine of 16 cores."""
    if not environ.get("PYTHONDONTWRITEBYTECODE"):
        return {}
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(out / "bytecode")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="a new folder; default: runs/gpu_check-DATE")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--engine-args", default="", metavar="FLAGS", help='more of sglang.launch_server: --engine-args="--a --b"'
    )
    default = f"{LIMIT_S[1]:.0f}, with two GPUs {LIMIT_S[2]:.0f}"
    parser.add_argument("--limit-s", type=float, help=f"of all parts together; default: {default}")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    gpus = len(visible_gpus()) if args.device == "cuda" else 2  # on the CPU two ranks need no more than one
    if not gpus:
        raise UserError("no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES, or try --device cpu")
    out = (args.out or Path("runs") / time.strftime("gpu_check-%Y%m%d-%H%M%S")).absolute()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out, or remove it")
    known = parts(args.device, args.engine_args, out)
    unknown = sorted(set(args.parts or ()) - {part.name for part in known})
    if unknown:
        names = ", ".join(repr(part.name) for part in known)
        raise UserError(f"--parts {unknown[0]!r} is none of the parts: {names}")
    env = {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **bytecode_cache(os.environ, out),
        "DEVICE": args.device,  # tests/conftest.py hides the GPUs from tests without it
        "COLLAB_MEGATRON_GPU_TESTS": args.device,
        "COLLAB_MEGATRON_GPU_ENGINE_ARGS": args.engine_args,
        **({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}),
    }
    os.chdir(REPOSITORY)  # where the parts find tests/ and conf/
    chosen = [part for part in known if (part.name in args.parts if args.parts else part.by_default)]
    limit_s = args.limit_s or LIMIT_S[min(gpus, 2)]
    outcomes = check(chosen, out, gpus=gpus, limit_s=limit_s, env=env)
    print(f"figures in {out / 'gpu_check.json'}, output of each part in {out / 'logs'}")
    if any(outcome.status not in WELL for outcome in outcomes):
        sys.exit(EXIT_RUN)


if __name__ == "__main__":
    run_cli(main)
