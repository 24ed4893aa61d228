"""Two workers of pytest-xdist: one takes the long files first, one the short ones, until they meet.

A worker gets a whole file, so a module's fixture is made once. Long tests start servers and whole runs, which use both
cores; so for most of the time only one of them runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

TOGETHER = {
    "tests/end_to_end": "tests/end_to_end",
    "tests/slurm": "tests/end_to_end",
    "tests/trainer/sync": "tests/trainer/sync",
}
"""Folder -> name of those that one worker runs: their files share servers that take long to start, or Slurm."""


def unit(nodeid: str) -> str:
    """What one worker runs: a file, or everything of one name in TOGETHER."""
    file = nodeid.partition("::")[0]
    return next((name for folder, name in TOGETHER.items() if file.startswith(f"{folder}/")), file)


def long_ones_first(items: list[pytest.Item]) -> None:
    """Order by unit, those with a slow test first; else as collected."""
    slow = {unit(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (unit(item.nodeid) not in TOGETHER.values(), unit(item.nodeid) not in slow))


class LongAndShort(LoadFileScheduling):
    """The first worker takes from the start of the queue, the others from its end."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # by the number of tests
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        if node is not _first(self.nodes):
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


def _first(nodes: Iterable[WorkerController]) -> WorkerController:
    return min(nodes, key=lambda node: node.gateway.id)
