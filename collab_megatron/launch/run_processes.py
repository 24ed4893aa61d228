"""Starts the processes of a run and waits until they end: engines, drivers, trainer ranks; on one node, or on many.

If a driver or trainer rank fails, all other processes are ended and its error message is printed. Engines are restarted
(fleet.py), and so are drivers that were killed (drivers.py). Where a process runs, and what it must know of its place,
is the site's business (site.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from collab_megatron.config import (
    BuildDatasetConfig,
    EvaluateConfig,
    RLConfig,
    SupervisedConfig,
    dump_config,
    show_config,
)
from collab_megatron.config.sections import ParallelSection
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.server_args import EngineCommand, engine_command, nccl_settings
from collab_megatron.files import publish_text
from collab_megatron.launch.attempts import begin_attempt
from collab_megatron.launch.drivers import READY_FILE, Drivers
from collab_megatron.launch.fleet import Fleet
from collab_megatron.launch.job_link import JobLink
from collab_megatron.launch.lock import RunLock
from collab_megatron.launch.many_nodes import ManyNodes
from collab_megatron.launch.node import device_of
from collab_megatron.launch.preflight import RLStart
from collab_megatron.launch.site import OneNode, Site, engine_gpus
from collab_megatron.launch.supervisor import ChildProcess, Supervisor

C = TypeVar("C", RLConfig, SupervisedConfig, EvaluateConfig)

DRIVER_END_S = 60.0
RESOLVED = "resolved.yaml"
ENGINES_READY = "engine"  # file that is there once all engines have answered
CHOSEN_THERE = "{port:http}"  # the agent of the server's node chooses its port
ONE_QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS"


def launch_rl(config: RLConfig, start: RLStart, lock: RunLock, link: JobLink | None = None) -> None:
    """Run engines, driver and trainers; returns when the run is done. link: of a job of several nodes. Raises RunError
    when a part fails."""
    shared = config.model_copy(update={"engine": start.engine})
    site: Site = OneNode(config, gpus=engine_gpus(config))
    if link is not None:
        site = ManyNodes(link, config, start.engine, shards=config.driver.shards)
    attempt = begin_attempt(config.run.logs_dir)
    with site.supervisor(config, attempt, lock) as supervisor:
        files = supervisor.scratch
        resolved = write_resolved(on_chosen_device(config), supervisor)
        keys_file = make_keys(supervisor, config)
        fleet = start_fleet(supervisor, shared, site, keys_file)
        addresses = site.driver_addresses(config.driver.shards)
        drivers = Drivers(supervisor, config.driver, resolved, start.max_context_tokens, keys_file, addresses)
        drivers.start(start.first_step)
        trainers = start_trainers(
            supervisor,
            "collab_megatron.train_rl",
            resolved,
            config.parallel,
            site,
            [
                *("--attempt", str(attempt.number), "--roster", str(site.roster_folder(supervisor))),
                *("--engine-ready-file", str(files / ENGINES_READY)),
                *("--driver-ready-file", str(files / READY_FILE)),
                *(("--engine-keys", str(keys_file)) if keys_file else ()),
            ],
            env=trainer_env(config),
        )
        fleet.wait_until_ready(tick=drivers.poll)
        supervisor.publish(ENGINES_READY, "ready")

        def look_after() -> None:
            fleet.poll()
            drivers.poll()

        supervisor.wait_for(trainers, tick=look_after)
        supervisor.wait_for(drivers.children, timeout_s=DRIVER_END_S)  # rank 0 has told them to stop


def launch_supervised(config: SupervisedConfig, module: str, lock: RunLock, link: JobLink | None = None) -> None:
    """Run the trainer ranks, each `python -m module`; returns when training is done. link: of a job of several nodes.
    Raises RunError when one fails."""
    site: Site = OneNode(config) if link is None else ManyNodes(link, config, None)
    attempt = begin_attempt(config.run.logs_dir)
    with site.supervisor(config, attempt, lock) as supervisor:
        resolved = write_resolved(on_chosen_device(config), supervisor)
        more = ["--attempt", str(attempt.number)]
        env = trainer_env(config)
        supervisor.wait_for(start_trainers(supervisor, module, resolved, config.parallel, site, more, env=env))


def make_keys(supervisor: Supervisor, config: RLConfig | EvaluateConfig | BuildDatasetConfig) -> Path | None:
    """A new file of API keys for the servers that we start; None for engine.urls, which keep their own."""
    return None if config.engine.urls else supervisor.publish("engine_keys.yaml", EngineKeys.new().text)


def start_fleet(
    supervisor: Supervisor,
    config: RLConfig | EvaluateConfig | BuildDatasetConfig,
    site: Site,
    keys_file: Path | None,
) -> Fleet:
    """Start the servers of a run. keys_file: from `make_keys`."""
    engine, model = config.engine, config.model
    assert model is not None, "a build without a model starts no server"
    engine = engine.model_copy(update={"host": site.engine_host(engine)})

    def build(number: int, port: int) -> EngineCommand:
        command = engine_command(
            engine,
            model_path=model.path,
            dtype=model.dtype,
            device=device_of(config.parallel),
            port=port or CHOSEN_THERE,
            seed=config.run.seed,
            number=number,
            threads=site.engine_threads(number),
            keys_file=keys_file,
            scratch=supervisor.scratch,
            text=isinstance(config, BuildDatasetConfig),
        )
        return replace(command, env={**command.env, **site.engine_env(number)})

    fleet = Fleet(supervisor, engine, site.roster(supervisor), build)
    fleet.start()
    return fleet


def start_trainers(
    supervisor: Supervisor,
    module: str,
    resolved: Path,
    parallel: ParallelSection,
    site: Site,
    extra: Sequence[str],
    *,
    env: Mapping[str, str],
) -> list[ChildProcess]:
    """One process per rank; rank 0 writes to our terminal, the others to their logs. env: of every rank besides."""
    argv = [sys.executable, "-m", module, str(resolved), "--trainer-rank", *extra]
    return [
        supervisor.start(f"trainer-{rank}", argv, {**site.rank_env(rank), **env}, show=rank == 0, saves=True)
        for rank in range(parallel.world_size)
    ]


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


def write_resolved(config: BaseModel, supervisor: Supervisor) -> Path:
    """Write the config that every process of this attempt reads to the temporary folder; the copy in the logs is
    masked. Raises RunError if it cannot be written."""
    publish_text(supervisor.logs_dir / RESOLVED, show_config(config))
    return supervisor.publish(RESOLVED, dump_config(config))


def launch_engine_only(
    supervisor: Supervisor, config: EvaluateConfig | BuildDatasetConfig
) -> tuple[list[str], EngineKeys | None]:
    """Start the engines of an evaluation or of a dataset build, on all GPUs of the node, and wait for them; their URLs
    and API keys."""
    keys_file = make_keys(supervisor, config)
    fleet = start_fleet(supervisor, config, OneNode(config), keys_file)
    fleet.wait_until_ready()
    return fleet.urls, EngineKeys.read(keys_file) if keys_file else None
