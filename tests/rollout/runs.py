"""Whole runs of real driver processes against the stand-in: a trainer that asks for its steps, and drivers killed -9.

`play` starts the drivers as a launcher does (launch/drivers.py), asks as the trainer does, and kills at the moments
that it is given. What the journal and the files hold afterwards is read by the functions below.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from collab_megatron.config import RLConfig, dump_config
from collab_megatron.config.sections import (
    AlgorithmSection,
    DataSection,
    DriverSection,
    JournalSection,
    LLMSection,
    ModelSection,
    RolloutSection,
    RunSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.data.parquet import write_tasks
from collab_megatron.demo import desk
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.launch.cli import shard_file, token_file
from collab_megatron.launch.drivers import Drivers
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.rollout.delivered_batches import DeliveredBatch
from collab_megatron.rollout.record_files import read_trees
from collab_megatron.types import Message, Task, TrainingSample
from collab_megatron.wire.protocol import DriverClient
from tests.forks import ForkingSupervisor, ForkServer

PROMPTS, REPLIES, FUTURES = 4, 2, 2
TASKS, HELD_OUT = 48, 6
"""More than a run takes: a task is met once."""
EVALUATED = 2
"""Before this step, and after the last, the held-out tasks are played."""
MAX_CONTEXT_TOKENS = 512
UPDATE_S = 0.1
"""What stands for the training between two steps."""
RUN_DEADLINE_S = 600.0
DRIVERS = ForkServer(["tests.rollout.preload"], {"OMP_NUM_THREADS": "1"})
MOMENTARY = frozenset({"calls", "begin_s", "end_s", "replayed"})
"""What the record tells of when and how a text was had: another attempt differs there alone."""


@contextmanager
def stand_in(folder: Path, *, latency_ms: float) -> Iterator[str]:
    """Its URL."""
    with ForkingSupervisor(DRIVERS, folder / "logs") as processes:
        ready = folder / "address"
        argv = ["-m", "tests.rollout.stand_in", "--ready-file", str(ready), "--latency-ms", str(latency_ms)]
        child = processes.start("stand-in", [sys.executable, *argv], {})
        yield f"http://{processes.wait_for_file(ready, child, timeout_s=60)}"


def counts(url: str) -> dict[str, Any]:
    figures: dict[str, Any] = httpx.get(f"{url}/counts", trust_env=False).json()
    return figures


def set_version(url: str, version: int) -> None:
    httpx.post(f"{url}/set_version", params={"v": version}, trust_env=False).raise_for_status()


def config(folder: Path, url: str, *, replay: str = "auto", min_group_std: float = 0.01, **driver: Any) -> RLConfig:
    """A run in `folder` with its data; the stand-in at `url` is engine, user and judge."""
    data = folder / "data"
    if not data.exists():
        build_tokenizer().save_pretrained(str(data / "model"))
        rng = random.Random(5)
        tasks = [_task(rng, number) for number in range(TASKS + HELD_OUT)]
        write_tasks(data / "train.parquet", tasks[:TASKS])
        write_tasks(data / "validation.parquet", tasks[TASKS:])
    user, judge = (
        {"model": f"hosted_vllm/{role}", "api_base": f"{url}/v1", "api_key_env": None} for role in ("user", "judge")
    )
    return RLConfig(
        run=RunSection(dir=folder),
        model=ModelSection(path=str(data / "model")),
        data=DataSection(train=data / "train.parquet", validation=data / "validation.parquet"),
        simulators=SimulatorsSection(user=UserSection(**user), judge=LLMSection(**judge)),
        rollout=RolloutSection(
            prompts_per_step=PROMPTS, num_replies=REPLIES, num_repeat_rollouts=FUTURES, max_new_tokens=24
        ),
        algorithm=AlgorithmSection(min_group_std=min_group_std),
        driver=DriverSection(**{"order": "prompt", "max_restarts": 1000, **driver}),
        journal=JournalSection.model_validate({"replay": replay}),
    )


def _task(rng: random.Random, number: int) -> Task:
    told = desk.sample_task(rng, "train")
    return Task(f"task-{number}", (Message("user", told.opening),), told.request, told.command)


@dataclass(frozen=True)
class Moment:
    """When a driver is killed."""

    paid: int  # replies that had been paid for by then, each counted once
    later_s: float  # after that


def moments(count: int, *, paid: int, start_s: float, seed: int) -> list[Moment]:
    """Random ones over a run that pays for so many replies. About every fourth comes within `start_s` of the one
    before: it meets the driver that was just started again, ready or not."""
    rng = random.Random(seed)
    found: list[Moment] = []
    for at in sorted(rng.randrange(paid) for _ in range(count)):
        if found and rng.random() < 0.25:
            found.append(Moment(found[-1].paid, rng.uniform(0.0, start_s)))
        else:
            found.append(Moment(at, rng.uniform(0.0, UPDATE_S)))
    return found


@dataclass(frozen=True)
class Played:
    """A run that has ended."""

    batches: list[tuple[TrainingSample, ...]]
    evaluations: list[dict[str, float]]  # without times
    kills: list[float]  # seconds since the epoch
    paid: int  # replies that the stand-in was asked for, each counted once, when the last batch came
    seconds: float


def play(
    config: RLConfig, url: str, *, steps: int, kills: Sequence[Moment] = (), victim: int = -1, warm: bool = True
) -> Played:
    """The run from step 0 to `steps`, its driver (of several shards the `victim`) killed at `kills` and started again.
    Its drivers are forked ones if `warm`.

    Raises RunError as a launcher and a trainer do.
    """
    folder = config.run.dir
    (folder / "resolved.yaml").write_text(dump_config(config))
    begin = time.monotonic()
    abandoned = threading.Event()
    logs = config.run.logs_dir
    with ForkingSupervisor(DRIVERS, logs) if warm else Supervisor(logs) as supervisor, ThreadPoolExecutor(1) as pool:
        ready = supervisor.scratch / "driver"
        drivers = Drivers(supervisor, config.driver, folder / "resolved.yaml", MAX_CONTEXT_TOKENS)
        drivers.start(0)
        # killed before it is ready as well: the trainer reads the address once
        trainer = pool.submit(_train, config, ready, url, steps, abandoned)
        try:
            killed = _look_after(drivers, supervisor, url, trainer, kills, victim)
        except BaseException:
            abandoned.set()
            raise
        batches, evaluations = trainer.result()
        supervisor.wait_for(drivers.children, timeout_s=30)
        figures = counts(url)
    return Played(batches, evaluations, killed, figures["paid"] - figures["repeated"], time.monotonic() - begin)


def _train(
    config: RLConfig, ready: Path, url: str, steps: int, abandoned: threading.Event
) -> tuple[list[tuple[TrainingSample, ...]], list[dict[str, float]]]:
    """Batches and evaluations."""
    batches: list[tuple[TrainingSample, ...]] = []
    evaluations: list[dict[str, float]] = []
    files = [shard_file(ready, shard) for shard in range(config.driver.shards)]
    while not all(file.exists() for file in files):
        if abandoned.wait(0.02):
            return batches, evaluations
    with closing(DriverClient([file.read_text() for file in files], token_file(ready).read_bytes())) as client:
        for done in range(steps + 1):
            set_version(url, done)
            if done in (EVALUATED, steps):
                figures = client.evaluate(done, done, [url], timeout_s=RUN_DEADLINE_S).content
                evaluations.append({name: value for name, value in figures.items() if name != "wall_s"})
            if done < steps:
                batches.append(client.next_batch(done, done, [url], timeout_s=RUN_DEADLINE_S).content.samples)
                time.sleep(UPDATE_S)
        client.stop()
    return batches, evaluations


def _look_after(
    drivers: Drivers,
    supervisor: Supervisor,
    url: str,
    trainer: Future[Any],
    kills: Sequence[Moment],
    victim: int,
) -> list[float]:
    """Until the trainer is done. Times of the kills."""
    deadline = time.monotonic() + RUN_DEADLINE_S
    times: list[float] = []
    left = list(kills)
    due = None
    with httpx.Client(trust_env=False) as client:
        while not trainer.done():
            assert time.monotonic() < deadline, f"{len(times)} kills; see {drivers.children[0].log}"
            time.sleep(0.005)
            supervisor.check()
            drivers.poll()
            if not left:
                continue
            figures = client.get(f"{url}/counts").json()
            if due is None and figures["paid"] - figures["repeated"] >= left[0].paid:
                due = time.monotonic() + left[0].later_s
            process = drivers.children[victim].process
            if due is not None and time.monotonic() >= due and process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                times.append(time.time())
                process.wait()
                left.pop(0)
                due = None
    return times


def lines(folder: Path, *, versions: bool = True) -> list[dict[str, Any]]:
    """The record of the run `run` without times, by step and as it stands there; of several shards together."""
    found = list(read_trees(folder / "conversations" / "run"))
    left_out = MOMENTARY if versions else MOMENTARY | {"weight_versions", "version_runs"}
    return sorted((_without(line, left_out) for line in found), key=lambda line: line["step"])


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(item, names) for name, item in value.items() if name not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def delivered(config: RLConfig) -> dict[int, list[tuple[int, int, bool]]]:
    """Step -> (step, slot, replaced) of the trees that the journal says were handed over, all shards together."""
    found: dict[int, list[tuple[int, int, bool]]] = {}
    with _journal(config) as journal:
        for step, content in journal.execute("SELECT step, content FROM deliveries ORDER BY step, shard"):
            found.setdefault(step, []).extend(msgspec.msgpack.decode(content, type=DeliveredBatch).trees)
    return found


def forget_deliveries(config: RLConfig) -> None:
    """What was sampled and paid for stays in the journal; the batches must be made of it again."""
    with _journal(config) as journal, journal:
        journal.execute("DELETE FROM deliveries")


def committed(config: RLConfig) -> tuple[int, int]:
    """Replies that the journal holds; and how many times it was given one."""
    with _journal(config) as journal:
        ((held,),) = journal.execute("SELECT count(*) FROM replies")
        ((given,),) = journal.execute("SELECT sum(calls) FROM spend")
    return held, given


@contextmanager
def _journal(config: RLConfig) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(config.run.dir / "journal" / f"{config.run.name}.sqlite")) as connection:
        yield connection
