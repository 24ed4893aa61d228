"""Where the processes of a run are, and what each must know of its place: here, on one node; many_nodes.py: on many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from collab_megatron.config import BuildDatasetConfig, EvaluateConfig, RLConfig, SupervisedConfig
from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import NO_GPU, ON_LOOPBACK, OPENMP_WAITS
from collab_megatron.launch.attempts import Attempt
from collab_megatron.launch.lock import RunLock
from collab_megatron.launch.node import device_of, visible_gpus
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.launch.threads import ThreadCounts, share_threads, usable_cores
from collab_megatron.wire.roster import RosterFolder

AnyConfig = RLConfig | SupervisedConfig | EvaluateConfig | BuildDatasetConfig
TrainingConfig = RLConfig | SupervisedConfig


class Site(Protocol):
    """The nodes of a run."""

    def supervisor(self, config: TrainingConfig, attempt: Attempt, lock: RunLock) -> Supervisor:
        """Not entered yet."""
        ...

    def roster(self, supervisor: Supervisor) -> RosterFolder:
        """The launcher's end of the roster."""
        ...

    def roster_folder(self, supervisor: Supervisor) -> Path:
        """The same as the trainer sees it."""
        ...

    def rank_env(self, rank: int) -> Mapping[str, str]:
        """Variables of a trainer rank. At each start ask for rank 0 first: then the ranks get a new place to meet."""
        ...

    def engine_host(self, engine: EngineSection) -> str:
        """The address that a server listens on."""
        ...

    def engine_threads(self, number: int) -> int:
        """Of each rank of a server, on CPU."""
        ...

    def engine_env(self, number: int) -> Mapping[str, str]:
        """Variables of a server besides those of engine/server_args.py."""
        ...

    def driver_addresses(self, shards: int) -> Sequence[str]:
        """tcp://HOST:PORT of each shard; empty where Unix-domain sockets do."""
        ...


class OneNode:
    """Everything on this node."""

    def __init__(self, config: AnyConfig, *, gpus: Sequence[str] | None = None) -> None:
        """gpus: ids of the GPUs of the servers, in order; None: all GPUs of this node, or none on the CPU."""
        self._config, self._gpus = config, gpus
        self._device = device_of(config.parallel)
        self._port = 0

    def supervisor(self, config: TrainingConfig, attempt: Attempt, lock: RunLock) -> Supervisor:
        return Supervisor(
            attempt.folder,
            held=lock.held,
            stopped_timeout_s=config.run.stopped_timeout_s,
            save_grace_s=config.train.save_grace_s,
            env=child_env(config),
        )

    def roster(self, supervisor: Supervisor) -> RosterFolder:
        return RosterFolder(self.roster_folder(supervisor))

    def roster_folder(self, supervisor: Supervisor) -> Path:
        return supervisor.logs_dir / "engines"

    def rank_env(self, rank: int) -> Mapping[str, str]:
        if rank == 0:
            self._port = free_port()
        env = {
            **rank_variables(rank, self._config.parallel.world_size, "127.0.0.1", self._port),
            "LOCAL_RANK": str(rank),
        }
        if not isinstance(self._config, RLConfig) or self._config.replay or engines_are_here(self._config.engine):
            env |= ON_LOOPBACK
        return env | cpu_variables(self._device, threads_of(self._config).trainer)

    def engine_host(self, engine: EngineSection) -> str:
        return engine.host

    def engine_threads(self, number: int) -> int:
        return threads_of(self._config).engine

    def engine_env(self, number: int) -> Mapping[str, str]:
        if self._device == "cpu":
            return {}
        size = self._config.engine.tensor if not isinstance(self._config, SupervisedConfig) else 0
        gpus = visible_gpus() if self._gpus is None else self._gpus
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number * size : (number + 1) * size])}

    def driver_addresses(self, shards: int) -> Sequence[str]:
        return ()


def child_env(config: AnyConfig) -> Mapping[str, str]:
    """Environment of every process of the run."""
    return NO_GPU if device_of(config.parallel) == "cpu" else {}


def rank_variables(rank: int, world: int, address: str, port: int) -> dict[str, str]:
    """What torch's rendezvous reads."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }


def cpu_variables(device: str, threads: int) -> dict[str, str]:
    """Of a trainer rank on the CPU; nothing on GPUs."""
    return {"OMP_NUM_THREADS": str(threads), **OPENMP_WAITS, **NO_GPU} if device == "cpu" else {}


def engines_are_here(engine: EngineSection) -> bool:
    """Whether all servers run on this node. Servers elsewhere must reach the trainer from outside to get weights."""
    return all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in engine.urls)


def engine_gpus(config: RLConfig) -> list[str] | None:
    """Ids of the GPUs of the engines, server by server; None on CPU."""
    if device_of(config.parallel) == "cpu":
        return None
    first = 0 if config.engine.placement == "colocated" else config.parallel.world_size
    return visible_gpus()[first:]


def threads_of(config: AnyConfig) -> ThreadCounts:
    """Threads of a trainer rank and of an engine rank: from the config, else a share of the cores. Used on CPU only."""
    engine = None if isinstance(config, SupervisedConfig) else config.engine
    replays = isinstance(config, RLConfig) and config.replay is not None
    return shared_threads(
        config,
        usable_cores(),
        trainer_ranks=0 if isinstance(config, EvaluateConfig | BuildDatasetConfig) else config.parallel.world_size,
        engine_ranks=0 if engine is None or engine.urls or replays else engine.count * engine.tensor,
    )


def shared_threads(config: AnyConfig, cores: int, *, trainer_ranks: int, engine_ranks: int) -> ThreadCounts:
    """As `threads_of`, of a node with so many cores and ranks."""
    engine = None if isinstance(config, SupervisedConfig) else config.engine
    at_once = isinstance(config, RLConfig) and config.driver.max_staleness > 0 and config.replay is None
    shared = share_threads(cores, trainer_ranks=trainer_ranks, engine_ranks=engine_ranks, at_once=at_once)
    return ThreadCounts(
        trainer=config.parallel.threads or shared.trainer,
        engine=(engine.threads if engine is not None else None) or shared.engine,
    )
