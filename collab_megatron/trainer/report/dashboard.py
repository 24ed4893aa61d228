"""Writer of a run's figures: TensorBoard events and one JSON line per step. Nothing else writes to TensorBoard.

Each attempt (a start, a resume) has an event file of its own, and its number in every line (`run/attempt`). A step that
is run again replaces its earlier points. A figure that was only ever zero is in the lines, not in TensorBoard: two
thirds of an RL run's are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from collab_megatron.errors import RunError
from collab_megatron.files import fsync
from collab_megatron.json_lines import append_rows, keep_rows, read_rows
from collab_megatron.trainer.report import charts

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
        self._shown: set[str] = set()  # figures that TensorBoard has
        self._zeros: dict[str, list[tuple[int, float]]] = {}  # of others: step and time of the first and last zero
        first = first_again(first_step)
        try:
            keep_rows(self._jsonl, lambda row: row["step"] < first, numbers=("step",))
        except OSError as error:
            raise self._refused(error) from None
        # TensorBoard reads files in the order of their names: second of the start, then process and number as text
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        # also for a new run: one over an earlier attempt's events would draw every curve twice
        self._writer = SummaryWriter(str(folder), purge_step=first)

    def text(self, name: str, text: str, step: int | None = None) -> None:
        """Add a page of text, such as the resolved config, of the whole run or a step. It is shown as it is: indented
        lines are code in Markdown, and no text can end that, as one with a fence could."""
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)

    def first_page(self) -> None:
        """Add the charts of an RL run (charts.py): TensorBoard's Custom Scalars tab."""
        self._writer.add_custom_scalars(charts.layout())

    def settings(self, values: Mapping[str, float | str], results: Sequence[str]) -> None:
        """Add settings to TensorBoard's HParams tab, which compares runs; `results`: figures to compare them by."""
        for summary in hparams(dict(values), dict.fromkeys(results, 0.0)):
            self._write(summary, None)

    def distribution(self, step: int, name: str, values: Sequence[float]) -> None:
        """Add a histogram of the finite ones among `values`."""
        finite = np.array([value for value in values if math.isfinite(value)])
        if finite.size:
            self._writer.add_histogram(name, finite, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the attempt and the finite figures of `step` under their names. Raises RunError if the disk refuses."""
        finite = {name: float(value) for name, value in sorted(metrics.items()) if math.isfinite(value)}
        for name, value in finite.items():
            self._point(name, value, step)
        if step != self._marked:  # a step may have several lines
            self._point(ATTEMPT, self._attempt, step)
            self._marked = step
        try:
            self._writer.flush()
            append_rows(self._jsonl, [{"step": step, ATTEMPT: self._attempt, **finite}])
        except OSError as error:
            raise self._refused(error) from None

    def _point(self, name: str, value: float, step: int) -> None:
        """Add a point of a curve. Leading zeros wait for the first other value; the first and last draw the same line
        as all."""
        now = time.time()
        if name in self._shown:
            self._write(Summary(value=[Summary.Value(tag=name, simple_value=value)]), step, now)
            return
        if value == 0:
            self._zeros[name] = [*self._zeros.get(name, [])[:1], (step, now)]
            return
        self._shown.add(name)
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        # TensorBoard reads that of the first point
        metadata = SummaryMetadata(plugin_data=plugin, summary_description=charts.description(name))
        for at, when in self._zeros.pop(name, []):
            self._write(Summary(value=[Summary.Value(tag=name, simple_value=0.0, metadata=metadata)]), at, when)
        self._write(Summary(value=[Summary.Value(tag=name, simple_value=value, metadata=metadata)]), step, now)

    def _write(self, summary: Summary, step: int | None, when: float | None = None) -> None:
        writer: FileWriter | None = self._writer.file_writer  # None after a close
        assert writer is not None
        writer.add_summary(summary, step, when)

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
