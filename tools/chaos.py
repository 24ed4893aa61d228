"""Chaos: an RL run in which processes are killed or stopped at random moments, and what each fault cost.

    python tools/chaos.py conf/demo_rl.yaml --faults 12 [--seed 0] [--json FILE]
        [--endpoint COMMAND [--answered FILE]] [section.key=value ...]

One node. A fault is SIGKILL or SIGSTOP to a trainer rank, an engine or a driver, or SIGKILL to the launcher, which is
then started again as a scheduler would. With --endpoint, the command of the server that plays user and judge, which is
started here, that server too is killed and started again after 5 s, or stopped for 5 s; --answered is the file with a
byte for each of its answers (demo.endpoint --answered). A fault comes at a random moment of a step, once the run has
gone on after the one before. The faults take turns in a random order of the seed. Printed at the end, and written with
--json: for each fault and role seconds until the run reports it, seconds until a step that was not done before is done,
and steps that were trained again; with --answered, answers that a process took with it before the journal had them.
Ends with 1 if the run does not complete, or if a step is missing or twice in its figures.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from rich.console import Console
from rich.table import Table

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.json_lines import read_rows
from collab_megatron.rollout.clients import open_journal
from collab_megatron.signals import end_at_signals
from collab_megatron.wire.completion import METRICS_FILE

STEP = re.compile(r"^\S+ (\d+)/\d+ \|", re.MULTILINE)
REPORTED = {
    "trainer": r"^trainer-\d+ (ended with signal|was given up)",
    "engine": r"^engine-\d+\S* (\(\S+\) )?(died|was given up|is given up)",
    "driver": r"^(driver\S* ended with signal|killing driver)",
}
"""The launcher's or the trainer's sentence, by role."""
FAULTS = (*itertools.product(("trainer", "engine", "driver"), ("SIGKILL", "SIGSTOP")), ("launcher", "SIGKILL"))
OF_ENDPOINT = (("endpoint", "SIGKILL"), ("endpoint", "SIGSTOP"))
OUTAGE_S = 5.0  # of the endpoint
FIRST_STEP_S, NEXT_STEP_S, END_S = 600.0, 600.0, 3600.0
# restarts without an end, short deadlines for what hangs
SETTINGS = ("train.max_restarts=10000", "engine.max_restarts=10000", "driver.max_restarts=10000", "run.resume=auto")


@dataclass(frozen=True)
class Cost:
    """What one fault cost."""

    role: str
    fault: str
    step: int  # the last one that was done before it
    detected_s: float  # until the run reported it; of launcher and endpoint: until it is there again
    recovered_s: float  # until the next step was done
    repeated_steps: int  # trained again, because no checkpoint had them


class ChaosRun:
    """The run, and its output."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        self._argv, self._log = argv, log
        self._read_from = 0  # in the log
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "collab_megatron.train_rl", *self._argv], stdout=sink, stderr=subprocess.STDOUT
            )
        return self.process

    def mark(self) -> None:
        """`new` begins here."""
        self._read_from = self._log.stat().st_size

    @property
    def new(self) -> str:
        """The output since `mark`."""
        return self._log.read_bytes()[self._read_from :].decode(errors="replace")

    @property
    def last_step(self) -> int:
        return max(map(int, STEP.findall(self._log.read_text(errors="replace"))), default=0)

    def wait_for(self, pattern: str, timeout_s: float) -> float:
        """Seconds until the new output has the pattern. Raises RunError at the deadline, or where the run has ended."""
        begin = time.monotonic()
        while not re.search(pattern, self.new, re.MULTILINE):
            self._check(begin, timeout_s, f"no line with {pattern!r}")
        return time.monotonic() - begin

    def wait_for_step(self, step: int, timeout_s: float) -> float:
        """Seconds until this step is done. Raises as `wait_for`."""
        begin = time.monotonic()
        while self.last_step < step:
            self._check(begin, timeout_s, f"step {step} was not done")
        return time.monotonic() - begin

    def _check(self, begin: float, timeout_s: float, what: str) -> None:
        if self.process.poll() is not None:
            raise RunError(f"the run ended with exit code {self.process.poll()}: {what}; see {self._log}")
        if time.monotonic() - begin > timeout_s:
            raise RunError(f"{what} within {timeout_s:g} s; see {self._log}")
        time.sleep(0.05)

    def victim(self, role: str, rng: random.Random) -> psutil.Process | None:
        """A process of the role; None while there is none."""
        if role == "launcher":
            return psutil.Process(self.process.pid)
        found = [process for process in self.family() if _role(process) == role]
        return rng.choice(sorted(found, key=lambda process: process.pid)) if found else None

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _role(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:  # it has just ended
        return ""
    if "--trainer-rank" in words:
        return "trainer"
    if "collab_megatron.rollout.service" in words:
        return "driver"
    return "engine" if "sglang.launch_server" in words or "sglang::scheduler" in "".join(words[:1]) else ""


class Endpoint:
    """The server that plays user and judge."""

    def __init__(self, command: str) -> None:
        self._argv = shlex.split(command)
        self.process = subprocess.Popen(self._argv)

    def strike(self, fault: str) -> None:
        """It is away for OUTAGE_S."""
        self.process.send_signal(getattr(signal, fault))
        time.sleep(OUTAGE_S)
        if fault == "SIGKILL":
            self.process.wait()
            self.process = subprocess.Popen(self._argv)
        else:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def faults(number: int, rng: random.Random, kinds: Sequence[tuple[str, str]] = FAULTS) -> Iterator[tuple[str, str]]:
    """Role and signal: each kind before any comes again, in random order."""
    made: list[tuple[str, str]] = []
    while len(made) < number:
        made += rng.sample(kinds, len(kinds))
    yield from made[:number]


def strike(run: ChaosRun, endpoint: Endpoint | None, role: str, fault: str, rng: random.Random) -> Cost:
    """One fault and what it costs. Raises RunError where the run does not go on."""
    if role == "endpoint":
        assert endpoint is not None, "faults of an endpoint need one"
        return strike_endpoint(run, endpoint, fault)
    while (victim := run.victim(role, rng)) is None:
        time.sleep(0.1)
    done = run.last_step
    run.mark()
    begin = time.monotonic()
    family = run.family() if role == "launcher" else []
    victim.send_signal(getattr(signal, fault))
    print(f"step {done}: {fault} to {role} (process {victim.pid})", flush=True)
    if role == "launcher":
        run.process.wait()
        gone, alive = psutil.wait_procs(family, timeout=120)  # they end by themselves
        if alive:
            raise RunError(f"{len(alive)} of {len(gone) + len(alive)} processes outlived the launcher")
        run.start()
    else:
        run.wait_for(REPORTED[role], NEXT_STEP_S)
    detected_s = time.monotonic() - begin
    before = run.last_step  # one may have ended between the choice of the victim and its end
    run.wait_for_step(before + 1, FIRST_STEP_S)
    return Cost(role, fault, before, detected_s, time.monotonic() - begin, repetitions(done, run.new))


def strike_endpoint(run: ChaosRun, endpoint: Endpoint, fault: str) -> Cost:
    """Nothing restarts: calls are sent again until they are answered. Raises as `strike`."""
    done = run.last_step
    run.mark()
    begin = time.monotonic()
    print(f"step {done}: {fault} to endpoint (process {endpoint.process.pid})", flush=True)
    endpoint.strike(fault)
    detected_s = time.monotonic() - begin
    before = run.last_step
    run.wait_for_step(before + 1, FIRST_STEP_S)
    return Cost("endpoint", fault, before, detected_s, time.monotonic() - begin, repetitions(done, run.new))


def repetitions(done: int, output: str) -> int:
    """Steps in the output that were trained again. done: the last one before it."""
    found = 0
    for step in map(int, STEP.findall(output)):
        found += step <= done
        done = max(done, step)
    return found


def lost_answers(config: RLConfig, answered: Path) -> tuple[int, int]:
    """Answers of the endpoint, and those of them that the journal does not have."""
    given = answered.stat().st_size
    with closing(open_journal(config)) as journal:
        return given, given - sum(spent.calls for spent in journal.spent().values())


def problems(config: RLConfig, code: int) -> list[str]:
    """What is wrong at the end of the run."""
    found = [] if code == 0 else [f"the run ended with exit code {code}"]
    rows = read_rows(config.run.tensorboard_dir / METRICS_FILE, numbers=("step",)).rows
    steps = [int(row["step"]) for row in rows if "train/tokens" in row]
    if steps != list(range(1, config.train.steps + 1)):
        found.append(f"metrics.jsonl has the steps {steps}, which are not each of {config.train.steps} once")
    return found


def table(costs: Sequence[Cost]) -> Table:
    """A line per role and fault: medians, and the largest in brackets."""
    made = Table("role", "fault", "times", "s to detection", "s to recovery", "steps trained again")
    for role, fault in (*FAULTS, *OF_ENDPOINT):
        mine = [cost for cost in costs if (cost.role, cost.fault) == (role, fault)]
        if not mine:
            continue
        columns = [
            f"{statistics.median(values):.1f} ({max(values):.1f})"
            for values in (
                [cost.detected_s for cost in mine],
                [cost.recovered_s for cost in mine],
                [float(cost.repeated_steps) for cost in mine],
            )
        ]
        made.add_row(role, fault, str(len(mine)), *columns)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--endpoint", metavar="COMMAND", help="of the server that plays user and judge")
    parser.add_argument("--answered", type=Path, help="has a byte for each answer of that server")
    args = parser.parse_intermixed_args()
    if args.faults < 1:
        raise UserError(f"--faults {args.faults} is no number of faults: name at least 1")
    overrides = [*args.overrides, *SETTINGS]
    config = load_config(RLConfig, args.config, overrides)
    if config.run.dir.exists() and any(config.run.dir.iterdir()):
        raise UserError(f"run.dir={config.run.dir} is not empty: chaos needs a run of its own, name a new folder")
    config.run.dir.mkdir(parents=True, exist_ok=True)
    end_at_signals()
    rng = random.Random(args.seed)
    endpoint = Endpoint(args.endpoint) if args.endpoint else None
    run = ChaosRun([str(args.config), *overrides], config.run.dir / "chaos.log")
    costs: list[Cost] = []
    kinds = (*FAULTS, *OF_ENDPOINT) if endpoint else FAULTS
    try:
        run.wait_for_step(1, FIRST_STEP_S)
        for role, fault in faults(args.faults, rng, kinds):
            if run.last_step >= config.train.steps - 2:
                raise UserError(f"the run is at its end after {len(costs)} faults: raise train.steps")
            pace = run.wait_for_step(run.last_step + 1, NEXT_STEP_S)
            time.sleep(rng.uniform(0, max(pace, 1.0)))
            costs.append(strike(run, endpoint, role, fault, rng))
            done = costs[-1]
            print(f"  reported after {done.detected_s:.1f} s, gone on after {done.recovered_s:.1f} s", flush=True)
        code = run.process.wait(END_S)
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait()
        if endpoint is not None:
            endpoint.end()
    Console().print(table(costs))
    wrong = problems(config, code)
    report = {"costs": [asdict(cost) for cost in costs], "steps": config.train.steps, "wrong": wrong}
    if args.answered is not None:
        report["answered"], report["lost_answers"] = lost_answers(config, args.answered)
        print(f"{report['lost_answers']} of {report['answered']} answers are not in the journal")
    if args.json is not None:
        publish_json(args.json, report)
    if wrong:
        raise RunError("; ".join(wrong))
    print(f"{len(costs)} faults, {config.train.steps} steps, each once in the figures")


if __name__ == "__main__":
    run_cli(main)
