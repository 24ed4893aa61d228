"""Builds a dataset with several worker processes: problems are split by index; progress and counts are summed."""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from typing import Any

from collab_megatron.config.entry import BuildDatasetConfig
from collab_megatron.data_engine.output import claim_output
from collab_megatron.data_engine.problems import Problem, read_problems
from collab_megatron.data_engine.worker import BuildCounts, build_share, journal_path
from collab_megatron.errors import RunError, UserError
from collab_megatron.log import set_up_logging
from collab_megatron.rollout.journal.housekeeping import empty
from collab_megatron.rollout.llm.accounting import RoleUsage
from collab_megatron.signals import die_with_parent

POLL_S = 0.5
END_S = 10.0  # deadline for a worker to end


@dataclass(frozen=True)
class BuildProgress:
    """Progress of all workers together."""

    total: int  # conversations to build, including those of earlier runs
    before: int  # finished by earlier runs
    counts: BuildCounts
    seconds: float  # since the first report of a worker, so that the rate excludes start-up

    @property
    def per_s(self) -> float:
        return self.counts.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def cost_usd(self) -> float:
        return sum(usage.cost_usd for usage in self.counts.usage.values())

    @property
    def calls(self) -> int:
        return sum(usage.calls for usage in self.counts.usage.values())

    @property
    def complete(self) -> bool:
        return self.before + self.counts.done == self.total

    def line(self) -> str:
        """One line for the terminal."""
        counts = self.counts
        left = self.total - self.before - counts.done - counts.failed
        eta = f"{left / self.per_s:.0f} s left" if self.per_s > 0 else "time left unknown"
        mean = f"{counts.mr_sum / counts.turns:.3f}" if counts.turns else "-"
        return (
            f"{self.before + counts.done}/{self.total} conversations  {self.per_s:.1f}/s  MR {mean}  "
            f"{counts.failed} failed  ${self.cost_usd:.2f}  {eta}"
        )


def build_dataset(config: BuildDatasetConfig, show: Callable[[BuildProgress], None]) -> BuildProgress:
    """Grow the conversations that are missing in `config.output`; `show` is called about every second.

    Raises UserError for bad settings or an LLM that cannot be reached, RunError if a worker dies or gives up.
    """
    found = read_problems(config)
    problems = found.chosen
    done = claim_output(config, found.contents)
    missing = [problem for problem in problems if problem.index not in done]
    tracker = _ProgressTracker(total=len(problems), before=len(problems) - len(missing), show=show)
    if not missing:
        return tracker.progress()
    count = min(config.processes, len(missing))
    if count == 1:
        asyncio.run(build_share(config, missing, 0, lambda counts: tracker.post(0, counts)))
    else:
        _run_workers(config, [missing[worker::count] for worker in range(count)], tracker)
    progress = tracker.progress()
    if progress.complete and not config.journal.keep_all:
        empty(journal_path(config))
    return progress


class _ProgressTracker:
    """The newest counts of each worker."""

    def __init__(self, total: int, before: int, show: Callable[[BuildProgress], None]) -> None:
        self._total, self._before, self._show = total, before, show
        self._counts: dict[int, BuildCounts] = {}
        self._started_at: float | None = None

    def post(self, worker: int, counts: BuildCounts) -> None:
        if self._started_at is None:
            self._started_at = time.monotonic() - 1.0  # the first report comes a second after the start
        self._counts[worker] = counts
        self._show(self.progress())

    def progress(self) -> BuildProgress:
        seconds = 0.0 if self._started_at is None else time.monotonic() - self._started_at
        return BuildProgress(self._total, self._before, _sum(self._counts), seconds)


def _sum(parts: Mapping[int, BuildCounts]) -> BuildCounts:
    total = BuildCounts()
    for counts in parts.values():
        total.done += counts.done
        total.failed += counts.failed
        total.rows += counts.rows
        total.turns += counts.turns
        total.mr_sum += counts.mr_sum
        total.last_error = counts.last_error or total.last_error
        total.warning = counts.warning or total.warning
        total.spent = counts.spent or total.spent
        for role, usage in counts.usage.items():
            held = total.usage.get(role, RoleUsage())
            total.usage[role] = RoleUsage(
                **{f.name: getattr(held, f.name) + getattr(usage, f.name) for f in fields(held)}
            )
    return total


def _run_workers(config: BuildDatasetConfig, shares: list[list[Problem]], tracker: _ProgressTracker) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the parent's event loop and locks
    news: Any = context.Queue()
    workers: list[BaseProcess] = [
        context.Process(target=_run_worker, args=(config, share, worker, news), name=f"build-{worker}", daemon=True)
        for worker, share in enumerate(shares)
    ]
    for process in workers:
        process.start()
    try:
        running = set(range(len(workers)))
        while running:
            try:
                worker, kind, content = news.get(timeout=POLL_S)
            except queue.Empty:
                for worker in running:
                    if not workers[worker].is_alive() and workers[worker].exitcode != 0:
                        raise RunError(
                            f"worker process {worker} died (exit code {workers[worker].exitcode}); finished "
                            "conversations are kept: run the same command again to continue"
                        ) from None
                continue
            if kind == "counts":
                tracker.post(worker, content)
            elif kind == "end":
                running.discard(worker)
            else:
                raise UserError(content) if kind == "user_error" else RunError(content)
    finally:
        for process in workers:
            process.join(timeout=END_S if process.exitcode is not None or not running else 0)
            if process.is_alive():
                process.terminate()
                process.join(timeout=END_S)


def _run_worker(config: BuildDatasetConfig, share: list[Problem], worker: int, news: Any) -> None:
    """A worker process. It puts its counts, then its end or an error, into `news`."""
    die_with_parent()  # after a kill -9 of the parent nobody else may write this share
    set_up_logging(f"build-{worker}")
    try:
        asyncio.run(build_share(config, share, worker, lambda counts: news.put((worker, "counts", counts))))
        news.put((worker, "end", None))
    except UserError as error:
        news.put((worker, "user_error", str(error)))
    except RunError as error:
        news.put((worker, "run_error", str(error)))
    except KeyboardInterrupt:
        news.put((worker, "run_error", "interrupted"))
