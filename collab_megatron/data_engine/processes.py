"""The data engine over several processes: problems sharded by index, one progress line, one set of final counts."""

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
from collab_megatron.data_engine.problems import Problem, read_problems
from collab_megatron.data_engine.shards import claim_output
from collab_megatron.data_engine.worker import Tally, build_share, journal_path
from collab_megatron.errors import RunError, UserError
from collab_megatron.log import set_up_logging
from collab_megatron.rollout.journal.housekeeping import empty
from collab_megatron.rollout.llm.accounting import RoleUsage
from collab_megatron.signals import die_with_parent

POLL_S = 0.5
END_S = 10.0  # how long a worker may take to end once it was told to


@dataclass(frozen=True)
class Progress:
    """The build as a whole."""

    total: int  # conversations asked for, the ones that were there before included
    before: int  # finished by earlier runs
    tally: Tally
    seconds: float  # since the first report of a worker: start-up is not part of the rate

    @property
    def per_s(self) -> float:
        return self.tally.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def cost_usd(self) -> float:
        return sum(usage.cost_usd for usage in self.tally.usage.values())

    @property
    def calls(self) -> int:
        return sum(usage.calls for usage in self.tally.usage.values())

    @property
    def complete(self) -> bool:
        return self.before + self.tally.done == self.total

    def line(self) -> str:
        """One line for the terminal."""
        tally = self.tally
        left = self.total - self.before - tally.done - tally.failed
        eta = f"{left / self.per_s:.0f} s left" if self.per_s > 0 else "time left unknown"
        mean = f"{tally.mr_sum / tally.turns:.3f}" if tally.turns else "-"
        return (
            f"{self.before + tally.done}/{self.total} conversations  {self.per_s:.1f}/s  MR {mean}  "
            f"{tally.failed} failed  ${self.cost_usd:.2f}  {eta}"
        )


def build_dataset(config: BuildDatasetConfig, show: Callable[[Progress], None]) -> Progress:
    """Grow the conversations that `config.output` lacks; `show` is called about every second.

    Raises UserError for bad settings or a role that nobody answers for, RunError if a worker dies or gives up.
    """
    problems = read_problems(config.problems, config.num_conversations)
    done = claim_output(config)
    missing = [problem for problem in problems if problem.index not in done]
    board = _Board(total=len(problems), before=len(problems) - len(missing), show=show)
    if not missing:
        return board.progress()
    count = min(config.processes, len(missing))
    if count == 1:
        asyncio.run(build_share(config, missing, 0, lambda tally: board.post(0, tally)))
    else:
        _run_workers(config, [missing[worker::count] for worker in range(count)], board)
    progress = board.progress()
    if progress.complete and not config.journal.keep_all:
        empty(journal_path(config))
    return progress


class _Board:
    """The newest tally of each worker."""

    def __init__(self, total: int, before: int, show: Callable[[Progress], None]) -> None:
        self._total, self._before, self._show = total, before, show
        self._tallies: dict[int, Tally] = {}
        self._started_at: float | None = None

    def post(self, worker: int, tally: Tally) -> None:
        if self._started_at is None:
            self._started_at = time.monotonic() - 1.0  # the first report comes a second after the first call
        self._tallies[worker] = tally
        self._show(self.progress())

    def progress(self) -> Progress:
        seconds = 0.0 if self._started_at is None else time.monotonic() - self._started_at
        return Progress(self._total, self._before, _sum(self._tallies), seconds)


def _sum(tallies: Mapping[int, Tally]) -> Tally:
    total = Tally()
    for tally in tallies.values():
        total.done += tally.done
        total.failed += tally.failed
        total.rows += tally.rows
        total.turns += tally.turns
        total.mr_sum += tally.mr_sum
        total.last_error = tally.last_error or total.last_error
        total.warning = tally.warning or total.warning
        total.spent = tally.spent or total.spent
        for role, usage in tally.usage.items():
            held = total.usage.get(role, RoleUsage())
            total.usage[role] = RoleUsage(
                **{f.name: getattr(held, f.name) + getattr(usage, f.name) for f in fields(held)}
            )
    return total


def _run_workers(config: BuildDatasetConfig, shares: list[list[Problem]], board: _Board) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the parent's event loop and locks
    news: Any = context.Queue()
    workers: list[BaseProcess] = [
        context.Process(target=_work, args=(config, share, worker, news), name=f"build-{worker}", daemon=True)
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
                            "conversations are kept, the same command goes on"
                        ) from None
                continue
            if kind == "tally":
                board.post(worker, content)
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


def _work(config: BuildDatasetConfig, share: list[Problem], worker: int, news: Any) -> None:
    """A worker process: its tallies and its end go through `news`."""
    die_with_parent()  # after a kill -9 of it the same command goes on with this share
    set_up_logging(f"build-{worker}")
    try:
        asyncio.run(build_share(config, share, worker, lambda tally: news.put((worker, "tally", tally))))
        news.put((worker, "end", None))
    except UserError as error:
        news.put((worker, "user_error", str(error)))
    except RunError as error:
        news.put((worker, "run_error", str(error)))
    except KeyboardInterrupt:
        news.put((worker, "run_error", "interrupted"))
