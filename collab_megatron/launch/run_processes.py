"""Starts the processes of a run on this node and waits until they end: engines, drivers, trainer ranks.

If a driver or trainer rank fails, all other processes are ended and its error message is printed. Engines are restarted
(fleet.py), and so are drivers that were killed (drivers.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel

from collab_megatron.config import (
    BuildDatasetConfig,
    EvaluateConfig,
    RLConfig,
    SupervisedConfig,
    dump_config,
    show_config,
)
from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.server_args import (
    NO_GPU,
    ON_LOOPBACK,
    OPENMP_WAITS,
    EngineCommand,
    engine_command,
    nccl_settings,
)
from collab_megatron.files import publish_text
from collab_megatron.launch.api_keys import key_variables
from collab_megatron.launch.attempts import Attempt, begin_attempt
from collab_megatron.launch.drivers import Drivers
from collab_megatron.launch.fleet import Fleet
from collab_megatron.launch.lock import RunLock
from collab_megatron.launch.node import device_of, visible_gpus
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.preflight import RLStart
from collab_megatron.launch.supervisor import ChildProcess, Supervisor
from collab_megatron.launch.threads import ThreadCounts, share_threads, usable_cores
from collab_megatron.wire.roster import RosterFolder

C = TypeVar("C", RLConfig, SupervisedConfig, EvaluateConfig)

DRIVER_END_S = 60.0
RESOLVED = "resolved.yaml"
ONE_QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS"


def launch_rl(config: RLConfig, start: RLStart, lock: RunLock) -> None:
    """Run engines, driver and trainers; returns when the run is done. Raises RunError when a part fails."""
    attempt = begin_attempt(config.run.logs_dir)
    with _supervisor(config, attempt, lock) as supervisor:
        files = supervisor.scratch
        resolved = write_resolved(on_chosen_device(config), supervisor)
        keys_file = make_keys(supervisor, config)
        shared = config.model_copy(update={"engine": start.engine})
        fleet = start_fleet(supervisor, shared, device_of(config.parallel), engine_gpus(config), keys_file)
        drivers = Drivers(supervisor, config.driver, resolved, start.max_context_tokens, files / "driver", keys_file)
        drivers.start(start.first_step)
        trainers = start_trainers(
            supervisor,
            "collab_megatron.train_rl",
            resolved,
            config.parallel,
            threads_of(config).trainer,
            [
                *("--attempt", str(attempt.number), "--roster", str(roster_folder(supervisor))),
                *("--engine-ready-file", str(files / "engine")),
                *("--driver-ready-file", str(files / "driver")),
                *(("--engine-keys", str(keys_file)) if keys_file else ()),
            ],
            here=engines_are_here(config.engine),
            env=trainer_env(config),
            unset=key_variables(config),
        )
        fleet.wait_until_ready()
        (files / "engine").write_text("ready")

        def look_after() -> None:
            fleet.poll()
            drivers.poll()

        supervisor.wait_for(trainers, tick=look_after)
        supervisor.wait_for(drivers.children, timeout_s=DRIVER_END_S)  # rank 0 has told them to stop


def _supervisor(config: RLConfig | SupervisedConfig, attempt: Attempt, lock: RunLock) -> Supervisor:
    return Supervisor(
        attempt.folder,
        held=lock.held,
        stopped_timeout_s=config.run.stopped_timeout_s,
        save_grace_s=config.train.save_grace_s,
        env=child_env(config),
    )


def child_env(config: RLConfig | SupervisedConfig | EvaluateConfig | BuildDatasetConfig) -> Mapping[str, str]:
    """Environment of every process of the run."""
    return NO_GPU if device_of(config.parallel) == "cpu" else {}


def launch_supervised(config: SupervisedConfig, module: str, lock: RunLock) -> None:
    """Run the trainer ranks, each `python -m module`; returns when training is done. Raises RunError when one fails."""
    attempt = begin_attempt(config.run.logs_dir)
    with _supervisor(config, attempt, lock) as supervisor:
        resolved = write_resolved(on_chosen_device(config), supervisor)
        supervisor.wait_for(
            start_trainers(
                supervisor,
                module,
                resolved,
                config.parallel,
                threads_of(config).trainer,
                ["--attempt", str(attempt.number)],
                env=trainer_env(config),
                unset=key_variables(config),
            )
        )


def make_keys(supervisor: Supervisor, config: RLConfig | EvaluateConfig | BuildDatasetConfig) -> Path | None:
    """A new file of API keys for the servers that we start; None for engine.urls, which keep their own."""
    if config.engine.urls:
        return None
    file = supervisor.scratch / "engine_keys.yaml"
    EngineKeys.make(file)
    return file


def start_fleet(
    supervisor: Supervisor,
    config: RLConfig | EvaluateConfig | BuildDatasetConfig,
    device: str,
    gpus: Sequence[str] | None,
    keys_file: Path | None,
) -> Fleet:
    """Start the servers of a run. gpus: ids of the GPUs that they may use, in order; None: all GPUs of this node.
    keys_file: from `make_keys`."""
    engine, model = config.engine, config.model
    assert model is not None, "a build without a model starts no server"

    def build(number: int, port: int) -> EngineCommand:
        command = engine_command(
            engine,
            model_path=model.path,
            dtype=model.dtype,
            device=device,
            port=port,
            seed=config.run.seed,
            number=number,
            threads=threads_of(config).engine,
            keys_file=keys_file,
            scratch=supervisor.scratch,
            text=isinstance(config, BuildDatasetConfig),
        )
        command = replace(command, unset=(*command.unset, *key_variables(config)))
        if gpus is None:
            return command
        own = ",".join(gpus[number * engine.tensor : (number + 1) * engine.tensor])
        return replace(command, env={**command.env, "CUDA_VISIBLE_DEVICES": own})

    fleet = Fleet(supervisor, engine, RosterFolder(roster_folder(supervisor)), build)
    fleet.start()
    return fleet


def engines_are_here(engine: EngineSection) -> bool:
    """Whether all servers run on this node. Servers elsewhere must reach the trainer from outside to get weights."""
    return all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in engine.urls)


def roster_folder(supervisor: Supervisor) -> Path:
    return supervisor.logs_dir / "engines"


def engine_gpus(config: RLConfig) -> list[str] | None:
    """Ids of the GPUs of the engines, server by server; None on CPU."""
    if device_of(config.parallel) == "cpu":
        return None
    first = 0 if config.engine.placement == "colocated" else config.parallel.world_size
    return visible_gpus()[first:]


def start_trainers(
    supervisor: Supervisor,
    module: str,
    resolved: Path,
    parallel: ParallelSection,
    threads: int,
    extra: list[str],
    *,
    here: bool = True,
    env: Mapping[str, str],
    unset: Sequence[str],
) -> list[ChildProcess]:
    """One process per rank; rank 0 writes to our terminal, the others to their logs. threads: of each rank, on CPU.
    here: all processes that they exchange tensors with run on this node. env: of every rank besides.
    unset: variables that no rank sees."""
    port = free_port()
    world = parallel.world_size
    argv = [sys.executable, "-m", module, str(resolved), "--trainer-rank", *extra]
    device = device_of(parallel)
    return [
        supervisor.start(
            f"trainer-{rank}",
            argv,
            {**_rank_env(rank, world, port, device, threads, here), **env},
            show=rank == 0,
            saves=True,
            unset=unset,
        )
        for rank in range(world)
    ]


def _rank_env(rank: int, world: int, port: int, device: str, threads: int, here: bool = True) -> Mapping[str, str]:
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    if here:
        env |= ON_LOOPBACK
    if device == "cpu":
        env |= {"OMP_NUM_THREADS": str(threads), **OPENMP_WAITS, **NO_GPU}
    return env


def trainer_env(config: RLConfig | SupervisedConfig) -> dict[str, str]:
    """Variables of every trainer rank on GPUs, which NCCL and the driver read when they are first used; what the user
    has set stays. Nothing on CPU."""
    if device_of(config.parallel) == "cpu":
        return {}
    env = {}
    if config.parallel.tensor > 1 or config.parallel.context > 1:
        # Megatron starts a collective just before the kernel that it shall overlap with, and relies on one queue for
        # that order (megatron-core 0.16.1, core/tensor_parallel/layers.py). Servers have 8: SGLang sets that itself
        env[ONE_QUEUE] = os.environ.get(ONE_QUEUE, "1")
    if isinstance(config, RLConfig) and config.sync.transport_for(config.engine.placement) == "broadcast":
        env |= nccl_settings(config.engine.extra_args, os.environ)
    return env


def on_chosen_device(config: C) -> C:
    """parallel.device=auto, decided once: a rank whose torch finds another device refuses to train."""
    parallel = config.parallel.model_copy(update={"device": device_of(config.parallel)})
    return config.model_copy(update={"parallel": parallel})


def threads_of(config: RLConfig | SupervisedConfig | EvaluateConfig | BuildDatasetConfig) -> ThreadCounts:
    """Threads of a trainer rank and of an engine rank: from the config, else a share of the cores. Used on CPU only."""
    parallel = config.parallel
    engine = None if isinstance(config, SupervisedConfig) else config.engine
    shared = share_threads(
        usable_cores(),
        trainer_ranks=0 if isinstance(config, EvaluateConfig | BuildDatasetConfig) else parallel.world_size,
        engine_ranks=0 if engine is None or engine.urls else engine.count * engine.tensor,
        at_once=isinstance(config, RLConfig) and config.driver.max_staleness > 0,
    )
    return ThreadCounts(
        trainer=parallel.threads or shared.trainer,
        engine=(engine.threads if engine is not None else None) or shared.engine,
    )


def write_resolved(config: BaseModel, supervisor: Supervisor) -> Path:
    """Write the config that every process of this attempt reads to the temporary folder; the copy in the logs is
    masked. Raises RunError if it cannot be written."""
    publish_text(supervisor.logs_dir / RESOLVED, show_config(config))
    publish_text(supervisor.scratch / RESOLVED, dump_config(config))
    return supervisor.scratch / RESOLVED


def launch_engine_only(
    supervisor: Supervisor, config: EvaluateConfig | BuildDatasetConfig
) -> tuple[list[str], EngineKeys | None]:
    """Start the engines of an evaluation or of a dataset build, on all GPUs of the node, and wait for them; their URLs
    and API keys."""
    device = device_of(config.parallel)
    keys_file = make_keys(supervisor, config)
    fleet = start_fleet(supervisor, config, device, visible_gpus() if device == "cuda" else None, keys_file)
    fleet.wait_until_ready()
    return fleet.urls, EngineKeys.read(keys_file) if keys_file else None
