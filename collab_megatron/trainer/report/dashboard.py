"""Writer of a run's figures: TensorBoard events and one JSON line per step. Nothing else writes to TensorBoard.

Each attempt (a start, a resume) has an event file of its own, and its number in every line (`run/attempt`). A step that
is run again replaces its earlier points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from collab_megatron.errors import RunError
from collab_megatron.files import fsync
from collab_megatron.json_lines import append_rows, keep_rows, read_rows

FILE = "metrics.jsonl"
ATTEMPT = "run/attempt"


class Dashboard:
    """For one process (the trainer's rank 0)."""

    def __init__(self, folder: Path, *, first_step: int, attempt: int = 1) -> None:
        """first_step: steps that are done and not run again; 0 for a new run. attempt: number of this start of the run.

        Raises UserError if metrics.jsonl has a damaged line.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl, self._attempt = folder / FILE, attempt
        self._marked: int | None = None  # the step whose attempt TensorBoard has
        first = first_again(first_step)
        try:
            keep_rows(self._jsonl, lambda row: row["step"] < first, numbers=("step",))
        except OSError as error:
            raise self._refused(error) from None
        # also for a new run: one over an earlier attempt's events would draw every curve twice
        self._writer = SummaryWriter(str(folder), purge_step=first)

    def text(self, name: str, text: str) -> None:
        """Add a page of text, such as the resolved config."""
        self._writer.add_text(name, f"```\n{text}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the attempt and the finite figures of `step` under their names. Raises RunError if the disk refuses."""
        finite = {name: float(value) for name, value in sorted(metrics.items()) if math.isfinite(value)}
        for name, value in finite.items():
            self._writer.add_scalar(name, value, step)
        if step != self._marked:  # a step may have several lines
            self._writer.add_scalar(ATTEMPT, self._attempt, step)
            self._marked = step
        try:
            self._writer.flush()
            append_rows(self._jsonl, [{"step": step, ATTEMPT: self._attempt, **finite}])
        except OSError as error:
            raise self._refused(error) from None

    def to_disk(self) -> None:
        """Force metrics.jsonl to the disk, so that it survives a power failure. Raises RunError if the disk refuses."""
        try:
            fsync(self._jsonl)
        except FileNotFoundError:
            return  # no line yet
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> RunError:
        return RunError(f"cannot write the dashboard to {self._jsonl.parent}: {error.strerror}")

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl in order; empty without the file. Raises UserError for a damaged line."""
    return read_rows(folder / FILE, numbers=("step",)).rows


def first_again(first_step: int) -> int:
    """The first step whose points are written again; points from it on are dropped.

    After a resume that is the step after the checkpoint's; a new run evaluates step 0 again.
    """
    return first_step + 1 if first_step else 0
