"""The command line of all entry points, and the arguments by which a trainer rank finds engines and drivers."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from collab_megatron.errors import RunError, UserError
from collab_megatron.launch.node import Node, parse_node, several, this_node
from collab_megatron.signals import end_at_signals


@dataclass(frozen=True)
class TrainerArguments:
    """The launcher's arguments for every trainer rank."""

    roster: Path | None = None  # folder that lists the engines that are up (wire/roster.py)
    engine_ready_file: Path | None = None  # exists once all engines have answered
    driver_ready_file: Path | None = None  # with .0, .1, ...: exists once that shard listens; holds its address
    engine_keys: Path | None = None  # file of API keys (engine/keys.py); None: the engines need none
    attempt: int = 1  # number of this start of the run (launch/attempts.py)

    def wait_for_engine(self, timeout_s: float) -> None:
        """Raises RunError at the deadline."""
        if self.engine_ready_file is not None:
            _wait_for_file(self.engine_ready_file, "the engines", timeout_s)

    def roster_folder(self) -> Path:
        """The folder that lists the engines that are up (wire/roster.py)."""
        if self.roster is None:
            raise RuntimeError("this run has no engines")
        return self.roster

    def driver_addresses(self, shards: int, timeout_s: float) -> list[str]:
        """The address of every driver process once it listens. Raises RunError at the deadline."""
        if self.driver_ready_file is None:
            raise RuntimeError("this run has no driver")
        files = [shard_file(self.driver_ready_file, shard) for shard in range(shards)]
        return [_wait_for_file(file, f"driver {shard}", timeout_s) for shard, file in enumerate(files)]

    def driver_token(self) -> bytes:
        """The secret in every request to a driver."""
        if self.driver_ready_file is None:
            raise RuntimeError("this run has no driver")
        return token_file(self.driver_ready_file).read_bytes()


@dataclass(frozen=True)
class JobArguments:
    """The launcher's end of a job of several nodes (many_nodes.py)."""

    address: str  # HOST:PORT where it listens for the agents
    nodes: str  # in Slurm's form; empty: those of the Slurm job


@dataclass(frozen=True)
class Arguments:
    """An entry point's command line."""

    config: Path
    overrides: list[str]
    dry_run: bool
    node: Node | None  # described by --gpus, --nodes and --hosts; None: this machine
    trainer: TrainerArguments | None  # set in a trainer rank, None in the launcher
    models: Sequence[str] = ()  # evaluate.py: the rows of its table; empty: all
    job: JobArguments | None = None  # set in the launcher of a job of several nodes

    @property
    def who(self) -> str:
        """This process in log lines: `launcher` or `trainer-RANK`."""
        return "launcher" if self.trainer is None else f"trainer-{os.environ.get('RANK', '0')}"


def parse_arguments(
    description: str | None, argv: list[str] | None = None, *, several_models: bool = False
) -> Arguments:
    """`several_models`: whether the entry point has --models. Raises UserError."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file, see conf/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and the plan, run all checks, start nothing",
    )
    parser.add_argument(
        "--gpus",
        metavar="COUNTxGB",
        help="with --dry-run: plan for a node with COUNT GPUs of GB memory each, such as 8x80",
    )
    if several_models:
        parser.add_argument(
            "--models",
            nargs="+",
            default=[],
            metavar="NAME",
            help="rows of the config's `models`, in this order, such as --models base sft rl; without it, all of them",
        )
    parser.add_argument("--nodes", type=int, metavar="N", help="with --dry-run: plan for a job of N such nodes")
    parser.add_argument(
        "--hosts",
        metavar="NAME:GPUS,...",
        help="with --dry-run: plan for these nodes, such as a:8,b:8,c:0 or gpu[001-064]:8",
    )
    job = parser.add_argument_group("a job of several nodes, with an agent on each (slurm/train_rl.sbatch)")
    job.add_argument("--job", metavar="HOST:PORT", help="where to listen for the agents; their key on standard input")
    job.add_argument("--job-nodes", metavar="NAMES", help="such as gpu[01-08]; by default those of the Slurm job")
    internal = parser.add_argument_group("set by the launcher")
    internal.add_argument("--trainer-rank", action="store_true", help=argparse.SUPPRESS)
    internal.add_argument("--roster", type=Path, help=argparse.SUPPRESS)
    internal.add_argument("--engine-ready-file", type=Path, help=argparse.SUPPRESS)
    internal.add_argument("--driver-ready-file", type=Path, help=argparse.SUPPRESS)
    internal.add_argument("--engine-keys", type=Path, help=argparse.SUPPRESS)
    internal.add_argument("--attempt", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    for option in ("gpus", "nodes", "hosts"):
        if getattr(args, option) is not None and not args.dry_run:
            raise UserError(
                f"--{option} plans for another machine and starts nothing: add --dry-run, or leave --{option} out"
            )
    node = None if args.gpus is None else parse_node(args.gpus)
    if args.nodes is not None or args.hosts is not None:
        node = several(node or this_node(), args.nodes, args.hosts)
    listed: list[str] = args.models if several_models else []
    models = [name for name in listed if "=" not in name]  # an override may follow the names
    if listed and not models:
        raise UserError(f"--models {' '.join(listed)} names no model: name rows of the config's `models`")
    trainer = None
    if args.trainer_rank:
        files = args.roster, args.engine_ready_file, args.driver_ready_file, args.engine_keys
        trainer = TrainerArguments(*files, attempt=args.attempt)
    else:
        end_at_signals()  # also before the first child starts. Not in a rank, which must end inside a collective too
    return Arguments(
        config=args.config,
        overrides=[*args.overrides, *(text for text in listed if "=" in text)],
        dry_run=args.dry_run,
        node=node,
        trainer=trainer,
        models=models,
        job=None if args.job is None else JobArguments(args.job, args.job_nodes or ""),
    )


def shard_file(ready_file: Path, shard: int) -> Path:
    return ready_file.with_name(f"{ready_file.name}.{shard}")


def token_file(ready_file: Path) -> Path:
    """The drivers' secret, next to their ready files; mode 600."""
    return ready_file.with_name(f"{ready_file.name}.token")


def _wait_for_file(path: Path, what: str, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"trainer waited over {timeout_s:g} s for {what}: see its log, or raise engine.startup_timeout_s"
            )
        time.sleep(0.05)
    return path.read_text()
