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
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = folder / "metrics.jsonl"
        if self._jsonl.exists():
            _drop_steps(self._jsonl, first_step)
        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

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


def _drop_steps(path: Path, first_step: int) -> None:
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
    publish_text(path, "".join(line + "\n" for line in kept))
