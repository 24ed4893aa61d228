"""Writes a run's figures: TensorBoard events and one JSON line per step. The only writer of TensorBoard.

Each attempt (a start, a resume) gets an event file of its own; steps that are run again overwrite what stood there.
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


class Dashboard:
    """For one process (the trainer's rank 0)."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """first_step: steps that are done, which this attempt does not run again; 0 where it begins from the start.

        Raises UserError where metrics.jsonl holds a line that is none of ours.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = folder / FILE
        first = first_again(first_step)
        try:
            keep_rows(self._jsonl, lambda row: row["step"] < first, numbers=("step",))
        except OSError as error:
            raise self._refused(error) from None
        # always given: a start over an earlier attempt's events would double its curves
        self._writer = SummaryWriter(str(folder), purge_step=first)

    def text(self, name: str, text: str) -> None:
        """A page of text, such as the resolved config."""
        self._writer.add_text(name, f"```\n{text}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Finite figures of `step` under their names. Raises RunError when the disk refuses."""
        finite = {name: float(value) for name, value in sorted(metrics.items()) if math.isfinite(value)}
        for name, value in finite.items():
            self._writer.add_scalar(name, value, step)
        try:
            self._writer.flush()
            append_rows(self._jsonl, [{"step": step, **finite}])
        except OSError as error:
            raise self._refused(error) from None

    def to_disk(self) -> None:
        """Return once the lines of metrics.jsonl outlive the machine's power. Raises RunError when the disk refuses."""
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
    """The lines of metrics.jsonl, in order; none where there is no file. Raises UserError for a damaged line."""
    return read_rows(folder / FILE, numbers=("step",)).rows


def first_again(first_step: int) -> int:
    """The first step whose points are written again; readers forget what earlier attempts wrote for it and after it.

    The checkpoint's own step has its points already. A start from 0 evaluates before its first step again.
    """
    return first_step + 1 if first_step else 0
