"""Torch traces of single training steps, of trainer ranks and of the engines (`profile` in the config).

They go into the attempt's log folder, for Perfetto or chrome://tracing:

    profile/step-5.trainer-0.json.gz                       of a rank, with the phases of the dashboard as ranges
    profile/step-5.engine-0-...-TP-0.trace.json.gz         of a server's rank, written by SGLang

A trace slows its step down. A server that writes none costs a warning, not the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from collab_megatron.config.sections import ProfileSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.wire.roster import EngineEntry

logger = logging.getLogger(__name__)

ENGINE_TIMEOUT_S = 120.0  # of one call: SGLang writes the trace before it answers


def no_engines() -> tuple[EngineEntry, ...]:
    """Of a run without engines."""
    return ()


class StepProfiler:
    """`with profiler.step(5): ...` traces the block if step 5 is to be traced. Not collective: ranks may differ."""

    def __init__(
        self,
        section: ProfileSection,
        folder: Path,
        grid: RankGrid,
        engines: Callable[[], tuple[EngineEntry, ...]] = no_engines,
        keys: EngineKeys | None = None,
    ) -> None:
        """folder: for the traces, made when needed. engines: the servers to trace, asked for on rank 0 only."""
        self._section, self._folder, self._grid = section, folder, grid
        self._engines, self._keys = engines, keys

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the block. If it raises, the servers are stopped and no file of this rank is written."""
        if number not in self._section.steps:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._servers(number), self._rank(number):
            yield

    @contextmanager
    def _rank(self, number: int) -> Iterator[None]:
        if self._grid.rank not in self._section.ranks:
            yield
            return
        with profile(activities=self._activities()) as profiler:
            yield
        path = self._folder / f"step-{number}.trainer-{self._grid.rank}.json.gz"
        profiler.export_chrome_trace(str(path))
        logger.info("trace of step %d: %s", number, path)

    def _activities(self) -> list[ProfilerActivity]:
        on_gpu = self._grid.device.type == "cuda"
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]

    @contextmanager
    def _servers(self, number: int) -> Iterator[None]:
        if not (self._section.engines and self._grid.is_main):
            yield
            return
        traced = self._call_all(self._engines(), lambda control, entry: self._start(control, entry, number))
        try:
            yield
        finally:
            self._call_all(traced, lambda control, _: control.stop_profile())

    def _start(self, control: EngineControl, entry: EngineEntry, number: int) -> None:
        on_gpu = self._grid.device.type == "cuda"
        control.start_profile(self._folder, f"step-{number}.{entry.name}", ("CPU", "GPU") if on_gpu else ("CPU",))

    def _call_all(
        self, entries: tuple[EngineEntry, ...], call: Callable[[EngineControl, EngineEntry], None]
    ) -> tuple[EngineEntry, ...]:
        """Call the servers at the same time; those that did as asked."""

        def one(entry: EngineEntry) -> bool:
            control = EngineControl(entry.url, timeout_s=ENGINE_TIMEOUT_S, keys=self._keys)
            try:
                call(control, entry)
            except RunError as error:
                logger.warning("no trace of %s: %s", entry.name, error)
                return False
            finally:
                control.close()
            return True

        if not entries:
            return ()
        with ThreadPoolExecutor(len(entries)) as pool:
            done = list(pool.map(one, entries))
        return tuple(entry for entry, well in zip(entries, done, strict=True) if well)
