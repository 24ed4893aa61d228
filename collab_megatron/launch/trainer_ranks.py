"""The trainer ranks of a run: started together, ended together, started again together.

A rank that a signal ended (the kernel's, when memory is short; a watchdog's; of a node that is lost) takes the others
with it: they wait for it in a collective. Then all of them start again in the same job and go on from the newest
checkpoint, `train.max_restarts` times in a row. A rank that ends with an error message ends the run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from collab_megatron.errors import RunError
from collab_megatron.launch.child_process import ChildProcess
from collab_megatron.launch.site import Site
from collab_megatron.launch.supervisor import Supervisor

SETTLE_S = 3.0
"""A rank whose peer was killed fails too, and may be seen first: only then is a failure the first cause."""
GONE_S = 60.0
POLL_S = 0.1


class TrainerRanks:
    """`start`, then `poll` until `done`."""

    def __init__(
        self,
        supervisor: Supervisor,
        site: Site,
        module: str,
        world_size: int,
        env: Mapping[str, str],
        unset: Sequence[str] = (),
    ) -> None:
        """module: run with `python -m` in each rank. env: of every rank besides the site's variables. unset: variables
        that no rank sees."""
        self._supervisor, self._site, self._module, self._env = supervisor, site, module, env
        self._world_size, self._unset = world_size, unset
        self._failed_at: float | None = None
        self.children: list[ChildProcess] = []

    def start(self, config: Path, extra: Sequence[str]) -> None:
        """One process per rank; rank 0 writes to our terminal, the others to their logs."""
        argv = [sys.executable, "-m", self._module, str(config), "--trainer-rank", *extra]
        self._failed_at = None
        self.children = [
            self._supervisor.start(
                f"trainer-{rank}",
                argv,
                {**self._site.rank_env(rank), **self._env},
                show=rank == 0,
                essential=False,
                saves=True,
                unset=self._unset,
            )
            for rank in range(self._world_size)
        ]

    @property
    def done(self) -> bool:
        """Whether all have ended well."""
        return all(child.process.poll() == 0 for child in self.children)

    def poll(self) -> str | None:
        """Why all ranks must start again; None: they need not. Raises RunError, or exits, where one has failed with a
        message of its own."""
        codes = {child.name: child.process.poll() for child in self.children}
        for child in self.children:
            if child.lost and codes[child.name] != 0:  # its peers cannot save without it
                self._supervisor.fail(child)
            if child.hung and codes[child.name] is None:
                return f"{child.name} was given up ({child.hung})"
            if (codes[child.name] or 0) < 0:
                return f"{child.name} ended with {child.ended()}"
        failed = [child for child in self.children if codes[child.name]]
        if failed:
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at > SETTLE_S or all(code is not None for code in codes.values()):
                self._supervisor.fail(failed[0])
        return None

    def end(self, tick: Callable[[], None], *, save_grace_s: float) -> None:
        """End all of them and wait until they are gone. If none has ended yet, they get `save_grace_s` to save: one
        that is stopped goes on then. `tick` is called repeatedly. Raises RunError where one does not end."""
        if all(child.process.poll() is None for child in self.children):
            for child in self.children:
                self._supervisor.terminate(child)
            deadline = time.monotonic() + save_grace_s
            while any(child.process.poll() is None for child in self.children) and time.monotonic() < deadline:
                tick()
                time.sleep(POLL_S)
        end_children(self._supervisor, self.children, tick)
        self.children = []


def end_children(supervisor: Supervisor, children: Sequence[ChildProcess], tick: Callable[[], None]) -> None:
    """Kill children and wait until they are gone. Raises RunError after GONE_S."""
    for child in children:
        supervisor.kill(child)
    left, deadline = list(children), time.monotonic() + GONE_S
    while left := [child for child in left if not supervisor.is_gone(child)]:
        if time.monotonic() > deadline:
            names = ", ".join(child.name for child in left)
            raise RunError(f"{names} did not end within {GONE_S:g} s after a kill: see the node's own log")
        tick()
        time.sleep(POLL_S)
