"""The placement of a run as lines of the plan: one line for nodes in a row that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from collab_megatron.config.sections import ParallelSection
from collab_megatron.launch.hosts import name_range
from collab_megatron.launch.placement import Placement

INDENT = " " * 12  # of the plan's second column


@dataclass(frozen=True)
class _Content:
    """What one node has."""

    host: int
    gpus: int
    trainers: tuple[int, ...]  # ranks
    engines: tuple[int, ...]  # numbers of the servers with a rank here
    idle: int  # GPUs without a rank

    @property
    def kind(self) -> tuple[int, ...]:
        """Equal for nodes that share a line."""
        return self.gpus, len(self.trainers), len(self.engines), self.idle


def placement_lines(placement: Placement, parallel: ParallelSection) -> list[str]:
    """The map of all nodes: GPUs, ranks and servers, what crosses nodes, and where launcher and drivers are."""
    hosts, servers = placement.hosts, placement.engines
    gpus = sum(len(host.gpus) for host in hosts)
    on_gpus = placement.trainers[0].gpu is not None
    has = _count(len(placement.trainers), "trainer rank")
    if servers:
        has += f", {_count(len(servers), 'server')} of {_count(len(servers[0].ranks), 'rank')}"
    there = f"{_count(len(hosts), 'node')}, " + (_count(gpus, "GPU") if on_gpus else "on CPUs")
    idle = f", {placement.idle_gpus:,} idle" if on_gpus else ""
    lines = [f"{'nodes':<12}{there}: {has}{idle}"]
    alike = [list(run) for _, run in groupby(_contents(placement), key=lambda content: content.kind)]
    names = [name_range(hosts[run[0].host : run[-1].host + 1]) for run in alike]
    width = max(map(len, names))
    lines += [f"{INDENT}{name:<{width}}  {_line(run, on_gpus)}" for name, run in zip(names, alike, strict=True)]
    across = placement.across_nodes(parallel)
    crosses = f"crosses nodes: {', '.join(across)}" if across else "nothing crosses nodes"
    where = f"launcher on {hosts[0].name}"
    if placement.drivers:
        where += f", {_count(len(placement.drivers), 'driver')} on {hosts[placement.drivers[0]].name}"
    lines.append(f"{INDENT}{crosses}; {where}")
    if servers:
        near = sum(map(placement.near_trainer, servers))
        lines.append(f"{INDENT}{near:,} of {_count(len(servers), 'server')} with trainer ranks on the same nodes")
    return lines


def _contents(placement: Placement) -> list[_Content]:
    trainers: list[list[int]] = [[] for _ in placement.hosts]
    engines: list[set[int]] = [set() for _ in placement.hosts]
    used: list[set[str | None]] = [{None} for _ in placement.hosts]
    for rank, place in enumerate(placement.trainers):
        trainers[place.host].append(rank)
        used[place.host].add(place.gpu)
    for engine in placement.engines:
        for place in engine.ranks:
            engines[place.host].add(engine.number)
            used[place.host].add(place.gpu)
    return [
        _Content(number, len(host.gpus), tuple(ranks), tuple(sorted(servers)), len(host.gpus) + 1 - len(gpus))
        for number, (host, ranks, servers, gpus) in enumerate(
            zip(placement.hosts, trainers, engines, used, strict=True)
        )
    ]


def _line(run: Sequence[_Content], on_gpus: bool) -> str:
    """One line for nodes that are alike."""
    first = run[0]
    each = f", {len(first.trainers)} on each" if len(run) > 1 else ""
    parts = [_range("trainer", [rank for content in run for rank in content.trainers]) + each] if first.trainers else []
    if first.engines:
        numbers = sorted({number for content in run for number in content.engines})
        parts.append(_range("engine", numbers))
    if not parts:
        parts.append("idle" if first.gpus or not on_gpus else "no ranks")
    elif on_gpus and first.idle:
        parts.append(f"{first.idle} idle")
    return (f"{_count(first.gpus, 'GPU'):<8}" if on_gpus else "") + "; ".join(parts)


def _range(what: str, numbers: Sequence[int]) -> str:
    first, last = min(numbers), max(numbers)
    if last - first + 1 != len(numbers):
        return f"{what} {', '.join(map(str, numbers))}"
    return f"{what} {first}" if first == last else f"{what} {first} to {last}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
