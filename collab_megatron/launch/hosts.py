"""The nodes of a job by name, each with its GPUs, and how the command line names them. Pure.

--nodes 64 --gpus 8x80              node1 to node64, eight GPUs each
--hosts gpu[001-064]:8,cpu1:0       names in Slurm's form, and the GPUs of each; without a number those of --gpus
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from collab_megatron.errors import UserError

MOST_NODES = 4096
MOST_GPUS = 64  # of a node
FORM = "write names with a number of GPUs, such as --hosts a:8,b:8,c:0 or --hosts gpu[001-064]:8"


@dataclass(frozen=True)
class Host:
    """One node of the job. Example: Host("gpu007", ("0", "1", "2", "3"))"""

    name: str
    gpus: tuple[str, ...] = ()  # ids in the form of CUDA_VISIBLE_DEVICES; empty: a node without GPUs


def equal_hosts(count: int, gpus: int) -> tuple[Host, ...]:
    """node1, node2, ..., each with `gpus` GPUs. Raises UserError for more than MOST_NODES."""
    if not 1 <= count <= MOST_NODES:
        raise UserError(f"--nodes {count} is not between 1 and {MOST_NODES:,}: name the number of nodes of the job")
    return tuple(_host(f"node{number}", gpus) for number in range(1, count + 1))


def parse_hosts(text: str, gpus: int) -> tuple[Host, ...]:
    """The value of --hosts. gpus: of a node that names no number. Raises UserError."""
    found: list[Host] = []
    for part in re.split(r",(?![^\[]*\])", text):  # not at commas in brackets
        match = re.fullmatch(r"([\w.-]*)(?:\[([\d,-]+)\])?([\w.-]*)(?::(\d{1,3}))?", part.strip())
        if match is None or not any(match[place] for place in (1, 2, 3)):
            raise UserError(f"--hosts: {part.strip()[:60]!r} is not the name of a node: {FORM}")
        count = gpus if match[4] is None else int(match[4])
        if count > MOST_GPUS:
            raise UserError(f"--hosts gives {match[1]}{match[3]} {count} GPUs, more than {MOST_GPUS}: correct it")
        numbers = [""] if match[2] is None else list(_numbers(match[2], part))
        found += [_host(f"{match[1]}{number}{match[3]}", count) for number in numbers]
        if len(found) > MOST_NODES:
            raise UserError(f"--hosts names more than {MOST_NODES:,} nodes: name fewer")
    if not found:
        raise UserError(f"--hosts names no node: {FORM}")
    names = [host.name for host in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--hosts names {twice} twice: name each node once")
    return tuple(found)


def name_range(hosts: Sequence[Host]) -> str:
    """`gpu001`, or `gpu001 to gpu064` for several in a row."""
    return hosts[0].name if len(hosts) == 1 else f"{hosts[0].name} to {hosts[-1].name}"


def _host(name: str, gpus: int) -> Host:
    return Host(name, tuple(str(number) for number in range(gpus)))


def _numbers(ranges: str, part: str) -> Iterator[str]:
    """`001-003,7` as 001, 002, 003, 7: leading zeros give the width."""
    for piece in ranges.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", piece)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--hosts: {piece!r} in {part.strip()[:60]!r} is no range of numbers: {FORM}")
        if int(match[2] or match[1]) - int(match[1]) >= MOST_NODES:
            raise UserError(f"--hosts names more than {MOST_NODES:,} nodes: name fewer")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield str(number).zfill(len(match[1]))
