"""Where the processes of a run go: from the nodes of a job and the config to trainer ranks, engines, drivers. Pure.

    node1  GPU 0 1 2 3 4 5 6 7     trainer ranks 0-7      launcher, drivers
    node2  GPU 0 1 2 3             trainer ranks 8-11
           GPU         4 5 6 7     engine-0, engine-1     share a node with trainer ranks
    node3  GPU 0 1 2 3 4 5 6 7     engine-2 to engine-5

- Ranks fill the nodes in the order of the job, so neighboring ranks (tensor, then context, data, pipeline; grid.py) are
  on one node. A tensor-parallel group never crosses a node unless parallel.tensor_across_nodes asks for it.
- An engine stays inside a node. One that is larger than every node (engine.tensor) takes whole nodes of equal size,
  for SGLang's --nnodes.
- Disaggregated engines take what the trainer leaves; colocated engine k has the GPUs of trainer ranks k x tensor and
  the following ones.
- On CPUs there is nothing to run out of: each side is divided evenly, over all nodes (colocated, or a single node), or
  over nodes of its own in proportion to its ranks.
- All driver shards are on one node, because they share the journal, an SQLite file on a local disk: the first node
  without GPUs of a GPU job, else the launcher's, which is the first.

Two orders are tried for disaggregated layouts, trainer first and engines first. One of them finds a placement if there
is any, where one of the two sizes (parallel.tensor, engine.tensor) divides the other, as powers of two do; with other
sizes and uneven nodes one can be missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.errors import UserError
from collab_megatron.launch.hosts import MOST_NODES, Host

AXES = ("tensor", "context", "data", "pipeline")  # of trainer ranks, the innermost first


@dataclass(frozen=True)
class RankPlace:
    """Where one rank of trainer or engine runs. Example: RankPlace(1, "4") is GPU 4 of the second node."""

    host: int  # index in Placement.hosts
    gpu: str | None  # None on a CPU


@dataclass(frozen=True)
class EnginePlace:
    """Where one SGLang server runs: the place of each tensor-parallel rank."""

    number: int
    ranks: tuple[RankPlace, ...]

    @property
    def hosts(self) -> tuple[int, ...]:
        """Its nodes in order; the server listens on the first."""
        return tuple(dict.fromkeys(place.host for place in self.ranks))


@dataclass(frozen=True)
class Placement:
    """The place of every process of a run. The launcher is on the first node."""

    hosts: tuple[Host, ...]
    trainers: tuple[RankPlace, ...]  # by rank
    engines: tuple[EnginePlace, ...]
    drivers: tuple[int, ...]  # index of the node, by shard

    def near_trainer(self, engine: EnginePlace) -> bool:
        """Whether every node of this engine has trainer ranks too, so that weights can stay in shared memory."""
        return set(engine.hosts) <= {place.host for place in self.trainers}

    def across_nodes(self, parallel: ParallelSection) -> tuple[str, ...]:
        """The axes of `parallel` of which at least one group has ranks on several nodes."""
        found, inner = [], 1
        for axis in AXES:
            size = getattr(parallel, axis)
            starts = (rank for rank in range(len(self.trainers)) if rank // inner % size == 0)
            groups = ({self.trainers[start + step * inner].host for step in range(size)} for start in starts)
            if any(len(group) > 1 for group in groups):
                found.append(axis)
            inner *= size
        return tuple(found)

    @property
    def idle_gpus(self) -> int:
        """GPUs that no rank uses."""
        used = {place for place in self.trainers if place.gpu is not None}
        used |= {place for engine in self.engines for place in engine.ranks if place.gpu is not None}
        return sum(len(host.gpus) for host in self.hosts) - len(used)


def place(
    hosts: Sequence[Host],
    parallel: ParallelSection,
    engine: EngineSection | None = None,
    *,
    device: str,
    shards: int = 0,
) -> Placement:
    """Place all ranks and drivers on `hosts`. Raises UserError, with what would fit, if that is not possible.

    engine: None for a run without engines (SFT, DPO); servers of engine.urls take no place. device: cpu | cuda.
    """
    if engine is not None and engine.urls:
        engine = None
    if device == "cpu":
        trainers, engines = _on_cpus(hosts, parallel, engine)
    else:
        found = _on_gpus(hosts, parallel, engine)
        if found is None:
            raise UserError(_what_would_fit(hosts, parallel, engine))
        trainers, engines = found
    without = [number for number, host in enumerate(hosts) if not host.gpus]
    driver = without[0] if device == "cuda" and without else 0
    places = tuple(EnginePlace(number, ranks) for number, ranks in enumerate(engines))
    return Placement(tuple(hosts), tuple(trainers), places, (driver,) * shards)


Ranks = list[RankPlace]
Servers = list[tuple[RankPlace, ...]]


def _on_cpus(hosts: Sequence[Host], parallel: ParallelSection, engine: EngineSection | None) -> tuple[Ranks, Servers]:
    world = parallel.world_size
    mine, theirs = range(len(hosts)), range(len(hosts))
    if engine is not None and engine.placement == "disaggregated" and len(hosts) > 1:
        engine_ranks = engine.count * engine.tensor
        share = round(len(hosts) * engine_ranks / (engine_ranks + world))
        of_engines = min(max(share, 1), len(hosts) - 1)
        mine, theirs = mine[:-of_engines], theirs[-of_engines:]
    together = 1 if parallel.tensor_across_nodes else parallel.tensor
    trainers = [RankPlace(host, None) for host in _evenly(world // together, mine) for _ in range(together)]
    if engine is None:
        return trainers, []
    return trainers, [(RankPlace(host, None),) * engine.tensor for host in _evenly(engine.count, theirs)]


def _evenly(number: int, places: Sequence[int]) -> list[int]:
    """`number` things over `places`, in order; they differ by one at most."""
    return [places[index * len(places) // number] if number > len(places) else places[index] for index in range(number)]


def _on_gpus(
    hosts: Sequence[Host], parallel: ParallelSection, engine: EngineSection | None
) -> tuple[Ranks, Servers] | None:
    """None: it does not fit."""
    together = 1 if parallel.tensor_across_nodes else parallel.tensor
    free = [[RankPlace(number, gpu) for gpu in host.gpus] for number, host in enumerate(hosts)]
    if engine is None:
        trainers = _take(free, range(len(hosts)), parallel.world_size // together, together)
        return None if trainers is None else ([place for group in trainers for place in group], [])
    if engine.placement == "colocated":
        return _colocated(free, together, parallel.world_size, engine)
    return _disaggregated(free, together, parallel.world_size, engine)


def _disaggregated(free: list[Ranks], together: int, world: int, engine: EngineSection) -> tuple[Ranks, Servers] | None:
    forward = range(len(free))
    widest = max(map(len, free))

    def trainers_of(left: list[Ranks]) -> list[Ranks] | None:
        return _take(left, forward, world // together, together)

    def engines_of(left: list[Ranks]) -> list[Ranks] | None:
        return _take(left, forward, engine.count, engine.tensor)

    def engines_at_the_end(left: list[Ranks]) -> list[Ranks] | None:
        found = _take(left, forward[::-1], engine.count, engine.tensor)
        return None if found is None else sorted(found, key=lambda ranks: (ranks[0].host, _number(ranks[0])))

    def whole_nodes(left: list[Ranks]) -> list[Ranks] | None:
        nodes = engine.tensor // widest
        if engine.tensor % widest or sum(len(gpus) == widest for gpus in left) < nodes * engine.count:
            return None
        last = [gpus for gpus in left if len(gpus) == widest][-nodes * engine.count :]
        found = [
            [place for gpus in last[first : first + nodes] for place in gpus] for first in range(0, len(last), nodes)
        ]
        for gpus in last:
            gpus.clear()
        return found

    orders: list[tuple[Callable[..., list[Ranks] | None], Callable[..., list[Ranks] | None], bool]]
    if engine.tensor > widest:
        orders = [(whole_nodes, trainers_of, True)]
    else:
        orders = [(trainers_of, engines_of, False), (engines_at_the_end, trainers_of, True)]
    for first, second, swapped in orders:
        left = [list(gpus) for gpus in free]
        one = first(left)
        other = None if one is None else second(left)
        if one is not None and other is not None:
            groups, servers = (other, one) if swapped else (one, other)
            return [place for group in groups for place in group], [tuple(ranks) for ranks in servers]
    return None


def _colocated(free: list[Ranks], together: int, world: int, engine: EngineSection) -> tuple[Ranks, Servers] | None:
    """One engine rank on each trainer GPU (machine_checks.check_placement has compared their numbers)."""
    widest = max(map(len, free))
    if engine.tensor <= widest:
        unit = math.lcm(together, engine.tensor)
        found = _take(free, range(len(free)), world // unit, unit)
    else:  # whole nodes, with equally many ranks on each
        per_node = next((size for size in range(widest, 0, -1) if not size % together and not engine.tensor % size), 0)
        if not per_node:
            return None
        left = [gpus[:per_node] if len(gpus) >= per_node else [] for gpus in free]
        found = _take(left, range(len(left)), world // per_node, per_node)
    if found is None or world % engine.tensor:
        return None
    trainers = [place for group in found for place in group]
    return trainers, [tuple(trainers[first : first + engine.tensor]) for first in range(0, world, engine.tensor)]


def _take(free: list[Ranks], order: Sequence[int], number: int, size: int) -> list[Ranks] | None:
    """Take `number` groups of `size` GPUs, each inside one node, and remove them from `free`; None: too few."""
    found: list[Ranks] = []
    for host in order:
        fits = min(len(free[host]) // size, number - len(found))
        found += [free[host][first : first + size] for first in range(0, fits * size, size)]
        del free[host][: fits * size]
    return found if len(found) == number else None


def _number(place: RankPlace) -> int:
    return int(place.gpu) if place.gpu is not None and place.gpu.isdecimal() else 0


def _what_would_fit(hosts: Sequence[Host], parallel: ParallelSection, engine: EngineSection | None) -> str:
    """The sentence for a layout that does not fit: the need, what is there, and changes that fit."""
    there = sum(len(host.gpus) for host in hosts)
    widest = max(hosts, key=lambda host: len(host.gpus))
    need = f"{parallel.world_size:,} trainer ranks"
    if engine is not None and engine.placement == "disaggregated":
        need += f" and {engine.count * engine.tensor:,} engine ranks"
    nodes = "1 node has" if len(hosts) == 1 else f"{len(hosts):,} nodes have"
    said = f"{need} do not fit: {nodes} {there:,} GPUs, at most {len(widest.gpus)} on one"
    if not parallel.tensor_across_nodes and parallel.tensor > len(widest.gpus):
        said += f", and a tensor-parallel group of {parallel.tensor} stays inside a node"
    return f"{said}; {', or '.join(_remedies(hosts, widest, parallel, engine)) or 'no smaller layout fits either'}"


def _remedies(
    hosts: Sequence[Host], widest: Host, parallel: ParallelSection, engine: EngineSection | None
) -> list[str]:
    """Changes of one key, or a number of nodes, with which it fits."""
    found = []

    def fits(more: Sequence[Host], layout: ParallelSection, servers: EngineSection | None) -> bool:
        return _on_gpus(more, layout, servers) is not None

    wanted = parallel.world_size + (engine.count * engine.tensor if engine is not None else 0)
    most = min(MOST_NODES, len(hosts) + 2 * wanted // max(1, len(widest.gpus)) + 2)
    if widest.gpus and fits([*hosts, *[widest] * (most - len(hosts))], parallel, engine):
        low, high = len(hosts), most  # with `high` nodes it fits, with `low` it does not
        while high - low > 1:
            middle = (low + high) // 2
            if fits([*hosts, *[widest] * (middle - len(hosts))], parallel, engine):
                high = middle
            else:
                low = middle
        found.append(f"ask for {high:,} nodes")
    for key in ("data", "tensor"):
        value = getattr(parallel, key)
        for smaller in (number for number in range(value - 1, 0, -1) if key == "data" or value % number == 0):
            layout = parallel.model_copy(update={key: smaller})
            servers = engine
            if engine is not None and engine.placement == "colocated":
                if layout.world_size % engine.tensor:
                    continue
                servers = engine.model_copy(update={"count": layout.world_size // engine.tensor})
            if fits(hosts, layout, servers):
                also = f" and engine.count={servers.count}" if servers is not None and servers is not engine else ""
                found.append(f"set parallel.{key}={smaller}{also}")
                break
    if engine is not None and engine.placement == "disaggregated":
        for smaller in range(engine.count - 1, 0, -1):
            if fits(hosts, parallel, engine.model_copy(update={"count": smaller})):
                found.append(f"set engine.count={smaller}")
                break
    across = parallel.model_copy(update={"tensor_across_nodes": True})
    if across != parallel and fits(hosts, across, engine):
        found.append("set parallel.tensor_across_nodes=true")
    return found
