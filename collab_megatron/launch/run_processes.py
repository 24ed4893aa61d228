"""Starts the processes of a run and waits until they end: engines, drivers, trainer ranks; on one node, or on many.

If a driver or trainer rank fails, all other processes are ended and its error message is printed. Engines are restarted
(fleet.py), and so are drivers and trainer ranks that were killed (drivers.py, trainer_ranks.py). Where a process runs,
and what it must know of its place, is the site's business (site.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel

from collab_megatron.config import (
    BuildDatasetConfig,
    EvaluateConfig,
    RLConfig,
    SupervisedConfig,
    dump_config,
    show_config,
)
from collab_megatron.config.sections import RunSection
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.server_args import EngineCommand, engine_command, nccl_settings
from collab_megatron.errors import RunError
from collab_megatron.files import publish_text
from collab_megatron.launch.api_keys import key_variables
from collab_megatron.launch.attempts import begin_attempt
from collab_megatron.launch.drivers import READY_FILE, Drivers
from collab_megatron.launch.fleet import Fleet
from collab_megatron.launch.job_link import JobLink
from collab_megatron.launch.lock import RunLock
from collab_megatron.launch.many_nodes import ManyNodes
from collab_megatron.launch.node import device_of
from collab_megatron.launch.preflight import RLStart
from collab_megatron.launch.restarts import Restarts
from collab_megatron.launch.site import OneNode, Site, engine_gpus
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.launch.trainer_ranks import TrainerRanks
from collab_megatron.wire.checkpoints import newest_complete, read_info

C = TypeVar("C", bound=RLConfig | SupervisedConfig | EvaluateConfig)

DRIVER_END_S = 60.0
POLL_S = 0.1
RESOLVED = "resolved.yaml"
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
        resolved = write_resolved(on_chosen_device(config), supervisor)
        keys_file = make_keys(supervisor, config)
        fleet = start_fleet(supervisor, shared, site, keys_file)
        addresses = site.driver_addresses(config.driver.shards)
        drivers = Drivers(supervisor, config.driver, resolved, start.max_context_tokens, keys_file, addresses)
        module, size = "collab_megatron.train_rl", config.parallel.world_size
        ranks = TrainerRanks(supervisor, site, module, size, trainer_env(config), key_variables(config))

        def start_ranks(resolved: Path, life: int) -> None:
            ready = f"engines-{life}"  # the file that is there once all engines have answered
            more = ["--attempt", str(attempt.number), "--roster", str(site.roster_folder(supervisor))]
            more += ["--engine-ready-file", str(supervisor.scratch / ready)]
            more += ["--driver-ready-file", str(supervisor.scratch / READY_FILE)]
            more += ["--engine-keys", str(keys_file)] if keys_file else []
            ranks.start(resolved, more)
            fleet.wait_until_ready(tick=look_after_ranks_too)
            supervisor.publish(ready, "ready")

        def look_after() -> None:
            supervisor.check()
            fleet.poll()
            drivers.poll()

        def look_after_ranks_too() -> None:
            look_after()
            ranks.poll()  # one with an error message ends the run; `watch` sees one that was killed

        def start_again(resolved: Path, life: int) -> None:
            if config.engine.placement == "colocated":  # their memory may be the trainer's at this moment
                fleet.restart("lost its trainer")
            drivers.restart(newest_step(config.run), look_after)
            start_ranks(resolved, life)

        drivers.start(start.first_step)
        start_ranks(resolved, 0)
        watch(config, supervisor, ranks, look_after, start_again)
        supervisor.wait_for(drivers.children, timeout_s=DRIVER_END_S)  # rank 0 has told them to stop


def launch_trainers(
    config: RLConfig | SupervisedConfig, module: str, lock: RunLock, link: JobLink | None = None
) -> None:
    """Run trainer ranks alone, each `python -m module`: supervised training, or RL on a record. Returns when they are
    done. link: of a job of several nodes. Raises RunError when one fails."""
    site: Site = OneNode(config) if link is None else ManyNodes(link, config, None)
    attempt = begin_attempt(config.run.logs_dir)
    with site.supervisor(config, attempt, lock) as supervisor:
        size = config.parallel.world_size
        ranks = TrainerRanks(supervisor, site, module, size, trainer_env(config), key_variables(config))

        def start_ranks(resolved: Path, life: int) -> None:
            ranks.start(resolved, ["--attempt", str(attempt.number)])

        start_ranks(write_resolved(on_chosen_device(config), supervisor), 0)
        watch(config, supervisor, ranks, supervisor.check, start_ranks)


def watch(
    config: RLConfig | SupervisedConfig,
    supervisor: Supervisor,
    ranks: TrainerRanks,
    look_after: Callable[[], None],
    start_again: Callable[[Path, int], None],
) -> None:
    """Until the trainer ranks are done. look_after: called repeatedly. start_again: starts what must be, with the
    config for resuming and the number of the start. Raises RunError when a part fails."""
    limit, lives, step = config.train.max_restarts, 0, 0
    if isinstance(config, RLConfig) and config.engine.placement == "colocated" and config.engine.urls:
        limit = 0
    restarts = Restarts(limit)
    while not ranks.done:
        look_after()
        if reason := ranks.poll():
            # a checkpoint of its own accord counts; one that hung ranks save below does not
            if not restarts.take(recovered=newest_step(config.run) > step):
                raise RunError(f"{reason}, after {restarts.count} restarts of the trainer (train.max_restarts={limit})")
            lives += 1
            print(f"{reason}: restarting the trainer ({restarts.count} of {limit})", flush=True)
            ranks.end(look_after, save_grace_s=config.train.save_grace_s)
            step = newest_step(config.run)
            print(f"all trainer ranks start again at step {step + 1}", flush=True)
            again = config.model_copy(
                update={"run": config.run.model_copy(update={"resume": config.run.resume or "auto"})}
            )
            start_again(supervisor.publish(f"again-{lives}.yaml", dump_config(on_chosen_device(again))), lives)
        time.sleep(POLL_S)


def newest_step(run: RunSection) -> int:
    """Steps in the newest complete checkpoint."""
    newest = newest_complete(run.checkpoints_dir)
    return 0 if newest is None else read_info(newest).step


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
        unset = (*command.unset, *key_variables(config))
        return replace(command, env={**command.env, **site.engine_env(number)}, unset=unset)

    fleet = Fleet(supervisor, engine, site.roster(supervisor), build)
    fleet.start()
    return fleet


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
    return cast(C, config.model_copy(update={"parallel": parallel}))


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
