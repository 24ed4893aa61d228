"""Many nodes: the place of every process of a job, and the launcher's way to its agents (agent.py).

    python -m collab_megatron.train_rl conf/mine.yaml --job 10.0.0.1:24680 --job-nodes gpu[01-08] < KEY

slurm/train_rl.sbatch calls it so. Without Slurm start an agent on every node, with the same key on standard input. All
nodes have the same environment at the same path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import EngineSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.launch.attempts import Attempt
from collab_megatron.launch.cli import JobArguments
from collab_megatron.launch.hosts import Host, parse_hosts
from collab_megatron.launch.job_link import JOIN_S, JobLink
from collab_megatron.launch.job_supervisor import SCRATCH, JobSupervisor
from collab_megatron.launch.lock import RunLock
from collab_megatron.launch.node import Node, device_of, this_node
from collab_megatron.launch.placement import Placement, place
from collab_megatron.launch.site import TrainingConfig, child_env, cpu_variables, rank_variables, shared_threads
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.launch.threads import ThreadCounts
from collab_megatron.wire.job import Hello
from collab_megatron.wire.roster import ROSTER_FILE, EngineEntry, RosterFolder
from collab_megatron.wire.sealed import read_key

BYE_S = 10.0
RANKS_PORT = 0  # index in Hello.ports of rank 0's node
DRIVER_PORTS = 1  # of the first driver shard, on the drivers' node
NODES_VARIABLE = "SLURM_JOB_NODELIST"


@contextmanager
def joined_job(arguments: JobArguments | None) -> Iterator[JobLink | None]:
    """The connection to the agents of all nodes, once each has said what its node has; None without a job of several
    nodes. Reads the key from standard input. At the end the agents leave. Raises UserError, RunError."""
    if arguments is None:
        yield None
        return
    names = arguments.nodes or os.environ.get(NODES_VARIABLE, "")
    if not names:
        raise UserError(f"--job needs the names of the nodes: add --job-nodes, such as gpu[01-08] ({NODES_VARIABLE})")
    nodes = [host.name for host in parse_hosts(names, 0)]
    link = JobLink(arguments.address, read_key(sys.stdin.read(200), "standard input"), nodes)
    try:
        link.wait_for_hellos(timeout_s=JOIN_S)
        _require_equal_packages([hello_of(link, node) for node in nodes])
        yield link
    finally:
        link.say_bye(timeout_s=BYE_S)
        link.close()


def hello_of(link: JobLink, node: str) -> Hello:
    hello = link.hello(node)
    assert hello is not None, "wait_for_hellos"
    return hello


def job_node(link: JobLink | None, planned: Node | None) -> Node | None:
    """What the checks plan for: `planned` (--gpus, --nodes) without a job, else this node with the hosts of the job."""
    if link is None:
        return planned
    hosts = hosts_of(link)
    return replace(this_node(), gpus=max(len(host.gpus) for host in hosts), hosts=hosts)


def hosts_of(link: JobLink) -> tuple[Host, ...]:
    return tuple(Host(node, hello_of(link, node).gpus) for node in link.nodes)


def _require_equal_packages(hellos: Sequence[Hello]) -> None:
    versions = {hello.package: hello.node for hello in hellos}
    if len(versions) > 1:
        said = ", ".join(f"{version} on {node}" for version, node in versions.items())
        raise RunError(f"the nodes have different versions of this package ({said}): give all the same environment")


class ManyNodes:
    """The site of a job of several nodes."""

    def __init__(self, link: JobLink, config: TrainingConfig, engine: EngineSection | None, *, shards: int = 0) -> None:
        """engine: None for a run without. Raises UserError where the layout does not fit."""
        self._link, self._config = link, config
        self._device = device_of(config.parallel)
        self.placement: Placement = place(hosts_of(link), config.parallel, engine, device=self._device, shards=shards)

        self._check_engines()

    def _check_engines(self) -> None:
        wide = next((engine for engine in self.placement.engines if len(engine.hosts) > 1), None)
        if wide is not None:
            raise UserError(
                f"engine.tensor={len(wide.ranks)} is more than the GPUs of a node, and a run starts no server across "
                "nodes yet: lower engine.tensor, or start such servers yourself and name them in engine.urls"
            )
        if not self.placement.engines or not isinstance(self._config, RLConfig):
            return
        transport = self._config.sync.transport_for(self._config.engine.placement)
        hosts = {place.host for place in self.placement.trainers} | {
            place.host for engine in self.placement.engines for place in engine.ranks
        }
        if transport == "ipc" and self._device == "cpu" and len(hosts) > 1:
            raise UserError(
                "sync.transport=ipc shares memory of one machine between CPU processes, and this job puts trainer and "
                "engines on several nodes: set sync.transport=broadcast"
            )

    def supervisor(self, config: TrainingConfig, attempt: Attempt, lock: RunLock) -> Supervisor:
        return JobSupervisor(
            self._link,
            attempt.folder,
            self.node_of,
            umask=config.run.umask,
            stopped_timeout_s=config.run.stopped_timeout_s,
            save_grace_s=config.train.save_grace_s,
            env=child_env(config),
        )

    def node_of(self, name: str) -> str:
        """The node of `trainer-12`, `engine-3`, `driver` or `driver-1`."""
        kind, _, number = name.partition("-")
        placement = self.placement
        if kind == "trainer":
            host = placement.trainers[int(number)].host
        elif kind == "engine":
            host = placement.engines[int(number)].hosts[0]
        else:
            host = placement.drivers[int(number or 0)]
        return placement.hosts[host].name

    def roster(self, supervisor: Supervisor) -> RosterFolder:
        return _JobRoster(supervisor.logs_dir / "engines", supervisor, self._link, self.node_of("trainer-0"))

    def roster_folder(self, supervisor: Supervisor) -> Path:
        return SCRATCH

    def rank_env(self, rank: int) -> Mapping[str, str]:
        placement = self.placement
        first = hello_of(self._link, self.node_of("trainer-0"))
        own = placement.trainers[rank]
        world = self._config.parallel.world_size
        gpus = placement.hosts[own.host].gpus
        here = [number for number, other in enumerate(placement.trainers) if other.host == own.host]
        local = here.index(rank) if own.gpu is None else gpus.index(own.gpu)
        return {
            **rank_variables(rank, world, first.address, first.ports[RANKS_PORT]),
            "LOCAL_RANK": str(local),
            **_interfaces(),
            **cpu_variables(self._device, self._threads(own.host).trainer),
        }

    def engine_host(self, engine: EngineSection) -> str:
        return "{address}"

    def engine_threads(self, number: int) -> int:
        return self._threads(self.placement.engines[number].hosts[0]).engine

    def engine_env(self, number: int) -> Mapping[str, str]:
        gpus = [place.gpu for place in self.placement.engines[number].ranks if place.gpu is not None]
        return _interfaces() | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})

    def driver_addresses(self, shards: int) -> Sequence[str]:
        hello = hello_of(self._link, self.node_of("driver"))
        if shards > len(hello.ports) - DRIVER_PORTS:
            raise UserError(
                f"driver.shards={shards} are more than a job of several nodes takes: set at most "
                f"{len(hello.ports) - DRIVER_PORTS}"
            )
        return [f"tcp://{hello.address}:{hello.ports[DRIVER_PORTS + shard]}" for shard in range(shards)]

    def _threads(self, host: int) -> ThreadCounts:
        return shared_threads(
            self._config,
            hello_of(self._link, self.placement.hosts[host].name).cores,
            trainer_ranks=sum(place.host == host for place in self.placement.trainers),
            engine_ranks=sum(place.host == host for engine in self.placement.engines for place in engine.ranks),
        )


class _JobRoster(RosterFolder):
    """The roster goes to the trainer's nodes, and its markers come back, through the agents."""

    def __init__(self, folder: Path, supervisor: Supervisor, link: JobLink, node: str) -> None:
        """folder: the launcher's copy. node: of trainer rank 0."""
        super().__init__(folder)
        self._supervisor, self._link, self._node = supervisor, link, node

    def publish(self, ready: Sequence[EngineEntry], coming: int) -> None:
        super().publish(ready, coming)
        self._supervisor.publish(ROSTER_FILE, (self.folder / ROSTER_FILE).read_text())

    def condemned(self, entry: EngineEntry) -> str | None:
        marker = self._link.marks(self._node).get(self._marker(entry).name)
        return marker.strip() if marker is not None else None


def _interfaces() -> dict[str, str]:
    """gloo and NCCL's bootstrap use the interface on which the nodes reach the launcher, unless the user named one.
    InfiniBand is NCCL's own business."""
    return {name: os.environ.get(name, "{interface}") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
