"""Grows conversation trees without training, into a record: to look at, to rescore, to train on.

    python -m collab_megatron.collect conf/mine.yaml [section.key=value ...] [--steps N] [--dry-run]
    python -m collab_megatron.collect conf/mine.yaml model.path=runs/mine/checkpoints/rl     with a run's weights

The config is one of train_rl. Engines are started (or engine.urls is used), and the drivers of training grow the trees
of the first N steps, with the prompts, limits, budget, judges and journal that training would have. Nothing is trained:
all trees are of the weights in model.path. The record is in RUN_DIR/conversations/collect-NAME (docs/record.md), where
view, rescore and replay.record read it.

The same command goes on where an earlier one stopped, or with a larger --steps; what was sampled and paid for is in the
journal. A spent budget ends it with exit code 3.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from collab_megatron.config import RLConfig, kept_config, load_config, show_config
from collab_megatron.config.sections import EvaluationSection, OptimizerSection, ParallelSection
from collab_megatron.engine.control import served_weights
from collab_megatron.errors import NoEngineLeft, RunError, UserError, run_cli
from collab_megatron.files import keep_from_others
from collab_megatron.launch.attempts import LATEST, begin_attempt
from collab_megatron.launch.cli import shard_file, token_file
from collab_megatron.launch.conversion import checkpoint_of, hf_folder_of
from collab_megatron.launch.drivers import READY_FILE, Drivers
from collab_megatron.launch.lock import RunLock, run_lock
from collab_megatron.launch.record_checks import check_collect
from collab_megatron.launch.run_processes import (
    DRIVER_END_S,
    RESOLVED,
    make_keys,
    on_chosen_device,
    start_fleet,
    write_resolved,
)
from collab_megatron.launch.site import OneNode, child_env
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.log import set_up_logging
from collab_megatron.rollout.record_files import read_trees, whole_steps
from collab_megatron.signals import end_at_signals
from collab_megatron.types import RolloutStatus
from collab_megatron.wire.checkpoints import read_info
from collab_megatron.wire.protocol import DriverClient, DriverHasNoEngine
from collab_megatron.wire.provenance import decisive_differences
from collab_megatron.wire.roster import RosterFolder

NAME = "collect"
POLL_S = 0.1


def to_collect(config: RLConfig, steps: int) -> RLConfig:
    """The config without what belongs to training: trainer ranks, schedule, evaluations, batches that are begun ahead,
    of which the last would be paid for in vain; under a name of its own."""
    if config.replay is not None or config.run.init_from is not None:
        key = "replay" if config.replay is not None else "run.init_from"
        raise UserError(f"collect samples from model.path and does not know {key}: set {key}=null")
    own = config.run.name if config.run.name.startswith(NAME) else f"{NAME}-{config.run.name}"
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": own}),
            "data": config.data.model_copy(update={"validation": None}),
            "train": config.train.model_copy(update={"steps": steps, "epochs": None, "eval_interval": 0}),
            "optimizer": OptimizerSection(),
            "parallel": ParallelSection(device=config.parallel.device),
            "engine": config.engine.model_copy(update={"placement": "disaggregated"}),
            "evaluation": EvaluationSection(),
            "driver": config.driver.model_copy(update={"max_staleness": 0, "oversample_prompts": 0}),
            "record": config.record.model_copy(update={"every": 1}),
        }
    )


class Engines:
    """The servers of a collection, whose weights stay as they are: one that comes back is used at once."""

    def __init__(self, roster: RosterFolder, wait_s: float) -> None:
        self._roster, self._wait_s = roster, wait_s
        self._none_since: float | None = None

    def urls(self) -> list[str]:
        """Those that are up and that the drivers have not given up."""
        return [e.url for e in self._roster.read().ready if not e.managed or self._roster.condemned(e) is None]

    def give_up(self, lost: dict[str, str]) -> None:
        """The launcher starts them again. lost: URL -> reason."""
        for entry in self._roster.read().ready:
            if entry.url in lost:
                self._roster.condemn(entry, lost[entry.url])

    def used(self) -> None:
        """They have answered."""
        self._none_since = None

    def wait(self, failure: NoEngineLeft) -> None:
        """Wait a moment for one to come back. Raises `failure` once none may come any more."""
        self._none_since = self._none_since or time.monotonic()
        roster = self._roster.read()
        if not (roster.coming or roster.ready) or time.monotonic() - self._none_since > self._wait_s:
            raise failure
        time.sleep(POLL_S)


def grow(config: RLConfig, first: int, context_tokens: int, lock: RunLock) -> None:
    """Grow the trees of the steps after `first`. Raises RunError when a part fails."""
    attempt = begin_attempt(config.run.logs_dir)
    with Supervisor(
        attempt.folder,
        held=lock.held,
        stopped_timeout_s=config.run.stopped_timeout_s,
        env=child_env(config),
    ) as supervisor:
        site, keys = OneNode(config), make_keys(supervisor, config)
        fleet = start_fleet(supervisor, config, site, keys)
        ready = supervisor.scratch / READY_FILE
        drivers = Drivers(supervisor, config.driver, write_resolved(config, supervisor), context_tokens, keys)
        drivers.start(first)
        fleet.wait_until_ready()

        def look_after() -> None:
            supervisor.check()
            fleet.poll()
            drivers.poll()

        engines = Engines(site.roster(supervisor), config.engine.wait_s)
        with drivers_of(config, ready, look_after) as client:
            for step in range(first, config.train.steps):
                ask(client, step, engines, config, look_after)
            client.stop()
        supervisor.wait_for(drivers.children, timeout_s=DRIVER_END_S)


@contextlib.contextmanager
def drivers_of(config: RLConfig, ready: Path, look_after: Callable[[], None]) -> Iterator[DriverClient]:
    """A client of the drivers, once they listen. Raises RunError at the deadline."""
    files = [shard_file(ready, shard) for shard in range(config.driver.shards)]
    deadline = time.monotonic() + config.engine.startup_timeout_s
    while not all(file.exists() for file in files):
        look_after()
        if time.monotonic() > deadline:
            raise RunError("the driver was not ready in time: see its log, or raise engine.startup_timeout_s")
        time.sleep(POLL_S)
    client = DriverClient([file.read_text() for file in files], token_file(ready).read_bytes(), look_after)
    with contextlib.closing(client):
        yield client


def ask(client: DriverClient, step: int, engines: Engines, config: RLConfig, look_after: Callable[[], None]) -> None:
    """Wait until the trees of `step` are in the record. Raises RunError as DriverClient.next_batch does, and where the
    record is full."""
    failure = NoEngineLeft("no engine is ready")
    while True:
        if urls := engines.urls():
            try:
                result = client.next_batch(step, None, urls, timeout_s=config.driver.step_timeout_s)
                break
            except DriverHasNoEngine as error:
                engines.give_up(error.lost)
                failure = error
        look_after()
        engines.wait(failure)
    engines.used()
    engines.give_up(result.lost)
    for note in result.notes:
        print(note, flush=True)
    figures = result.content.metrics
    print(
        f"{config.run.name} {step + 1}/{config.train.steps}  reward {figures.get('reward/mr_mean', float('nan')):.2f}, "
        f"${figures['budget/usd_to_date']:.4f} and {figures['budget/calls_to_date']:.0f} calls to date",
        flush=True,
    )
    if whole_steps(config.run.conversations_dir, config.driver.shards) <= step:
        raise RunError(
            f"step {step + 1} is not in the record, so collecting ends: raise record.max_mb={config.record.max_mb}; "
            "the trees are in the journal, and the same command writes them"
        )


def table(folder: Path) -> list[str]:
    """What a record holds: a line for each step, and one for all."""
    steps = [(str(step), list(trees)) for step, trees in groupby(read_trees(folder), key=lambda tree: tree["step"])]
    if not steps:
        return [f"no trees in {folder}"]
    if len(steps) > 1:
        steps.append(("all", [tree for _, trees in steps for tree in trees]))
    heads = ("trees", "reward", "spread", "dropped", "failures", "calls", "dollars")
    lines = ["".join([f"{'step':>6}", *(f"{head:>10}" for head in heads)])]
    return lines + ["".join([f"{step:>6}", *(f"{cell:>10}" for cell in _cells(trees))]) for step, trees in steps]


def _cells(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trees, mean reward of the replies, its spread between the replies to a prompt, dropped trees, futures without a
    score, calls, dollars."""
    rewards = [[reply["mr"] for reply in tree["replies"] if reply["mr"] is not None] for tree in trees]
    every = [reward for own in rewards for reward in own]
    spreads = [stdev(own) for own in rewards if len(own) > 1]
    futures = [future for tree in trees for reply in tree["replies"] for future in reply["futures"]]
    calls = [call for future in futures for call in future["calls"] if not call["shared"]]
    return [
        f"{len(trees):,}",
        *(f"{fmean(found):.3f}" if found else "none" for found in (every, spreads)),
        f"{sum(not tree['kept'] for tree in trees):,}",
        f"{sum(not RolloutStatus(future['status']).scored for future in futures):,}",
        f"{len(calls):,}",
        f"{sum(call['cost_usd'] for call in calls):.4f}",
    ]


def with_own_journal(config: RLConfig) -> RLConfig:
    """The config with a journal for the weights that engine.urls serve; servers that we start have those of model.path,
    which the journal knows. Raises UserError for servers with different weights."""
    if not config.engine.urls:
        return config
    weights = served_weights(config.engine.urls, timeout_s=config.engine.startup_timeout_s)
    path = config.journal.path or config.run.dir / "journal" / f"{config.run.name}.sqlite"
    own = config.journal.model_copy(update={"path": path.with_stem(f"{path.stem}-{weights}")})
    return config.model_copy(update={"journal": own})


def refuse_other_config(config: RLConfig) -> None:
    """Raise UserError where the record has trees of another config or other weights."""
    try:
        earlier = yaml.safe_load((config.run.logs_dir / LATEST / RESOLVED).read_text())
    except OSError:
        return
    now = kept_config(config)
    other = decisive_differences({"config": earlier}, now)
    if config.engine.urls and earlier["journal"] != now["journal"]:
        other.append("engine.urls serve other weights")
    if other:
        raise UserError(
            f"{config.run.conversations_dir} has trees of another config ({other[0]}): choose another run.name, or "
            "remove that folder to collect again"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m collab_megatron.collect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="of trees, in all; default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print config and plan, run all checks, start nothing")
    args = parser.parse_intermixed_args()
    set_up_logging(NAME)
    end_at_signals()
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} grows nothing: give a number above 0")
    given = load_config(RLConfig, args.config, args.overrides)
    config = to_collect(given, args.steps)
    keep_from_others(config.run.umask)
    checkpoint = checkpoint_of(config.model.path)
    if checkpoint is not None:  # config and tokenizer of it, until it is converted
        config = with_model(config, read_info(checkpoint).hf_folder)
    if args.dry_run:
        print(show_config(config), flush=True)
        check_collect(config, dry_run=True)
        return
    with run_lock(config.run) as lock:
        context_tokens = check_collect(config)
        folder = config.run.conversations_dir
        done = whole_steps(folder, config.driver.shards)
        if checkpoint is not None:
            config = with_model(config, hf_folder_of(checkpoint, config.run.dir / "converted", config.run.logs_dir))
        config = with_own_journal(on_chosen_device(config))
        if done:
            refuse_other_config(config)
            print(f"record      {folder} has {done} of {args.steps} steps", flush=True)
        try:
            if done < args.steps:
                grow(config, done, context_tokens, lock)
        except (KeyboardInterrupt, RunError):
            print("\nthe same command goes on from here, and pays for nothing twice", flush=True)
            raise
        finally:
            print("\n".join(["", *table(folder), f"record      {folder}"]), flush=True)


def with_model(config: RLConfig, folder: Path) -> RLConfig:
    """The config with the weights in another folder."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


if __name__ == "__main__":
    run_cli(main)
