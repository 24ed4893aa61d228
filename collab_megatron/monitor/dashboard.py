"""Writes a run's figures: TensorBoard events and one JSON line per step. The only writer of TensorBoard.

Each attempt (a start, a resume) gets an event file of its own; steps that are run again overwrite what stood there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from collab_megatron.errors import RunError
from collab_megatron.files import publish_text


class Dashboard:
    """For one process (the trainer's rank 0)."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """first_step: steps that are done, which this attempt does not run again; 0 where it begins from the start."""
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = folder / "metrics.jsonl"
        if self._jsonl.exists():
            _drop_steps(self._jsonl, first_again(first_step))
        # always given: a start over an earlier attempt's events would double its curves
        self._writer = SummaryWriter(str(folder), purge_step=first_again(first_step))

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
            with self._jsonl.open("a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise RunError(f"cannot write the dashboard to {self._jsonl.parent}: {error.strerror}") from None

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, in order."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def first_again(first_step: int) -> int:
    """The first step whose points are written again; readers forget what earlier attempts wrote for it and after it.

    The checkpoint's own step has its points already. A start from 0 evaluates before its first step again.
    """
    return first_step + 1 if first_step else 0


def _drop_steps(path: Path, first: int) -> None:
    # a full disk or a kill leaves half a line at the end
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    publish_text(path, "".join(line for line in whole if json.loads(line)["step"] < first))
