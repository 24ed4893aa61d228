"""What rank 0 tells the user: the progress line, the dashboard, the evaluation file."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from collab_megatron.config import RLConfig, dump_config
from collab_megatron.errors import RunError
from collab_megatron.files import publish_text
from collab_megatron.monitor.dashboard import Dashboard
from collab_megatron.monitor.progress import Progress
from collab_megatron.resharding.publisher import SyncReport

logger = logging.getLogger(__name__)


class Reporter:
    """For the trainer's rank 0."""

    def __init__(self, config: RLConfig, *, first_step: int) -> None:
        self._evaluations = config.run.evaluations_file
        drop_evaluations(self._evaluations, after=first_step)
        self._dashboard = Dashboard(config.run.tensorboard_dir, first_step=first_step)
        self._dashboard.text("config", dump_config(config))
        self._progress = Progress(config.run.name, first_step=first_step, total_steps=config.train.steps)
        self._since = time.monotonic()
        self._failed_evaluations = 0

    def step(
        self,
        done: int,
        rollout: Mapping[str, float],
        update: Mapping[str, float],
        sync: SyncReport,
        seconds: Mapping[str, float],
    ) -> None:
        """Figures of the step that has just ended; `done` counts from 1."""
        metrics = {**rollout, **update, **seconds}
        metrics |= sync.metrics()
        metrics["train/tokens_per_s"] = update["train/tokens"] / max(seconds["time_s/update"], 1e-9)
        self._dashboard.log(done, metrics)
        self._progress.step(
            done,
            {
                "reward": _shown(metrics, "reward/mr_mean"),
                "accuracy": _shown(metrics, "reward/accuracy_mean"),
                "asks if unclear": _shown(metrics, "rollout/clarify_rate_ambiguous"),
                "if clear": _shown(metrics, "rollout/clarify_rate_complete"),
                "kl": _shown(metrics, "train/kl"),
                "tokens/s": _shown(metrics, "rollout/tokens_per_s", digits=0),
            },
        )

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Held-out figures of the weights after `step` steps."""
        self._progress.pause(figures.get("wall_s", 0.0))
        named = {f"eval/{name}": value for name, value in figures.items()}
        self._dashboard.log(step, {**named, "eval/failed": self._failed_evaluations})
        append_evaluation(self._evaluations, step, figures)
        shown = ", ".join(
            f"{name} {figures[name]:.3f}"
            for name in ("accuracy", "clarify_rate_ambiguous", "clarify_rate_complete", "mr")
            if name in figures
        )
        print(f"held-out after step {step}: {shown} ({int(figures['conversations'])} conversations)", flush=True)

    def evaluation_failed(self, step: int, why: str) -> None:
        """The weights after `step` steps have no held-out figures; training goes on."""
        self._failed_evaluations += 1
        self._dashboard.log(step, {"eval/failed": self._failed_evaluations})
        logger.warning("the evaluation after step %d failed, training goes on: %s", step, why)

    def close(self) -> None:
        self._dashboard.close()


def _shown(metrics: Mapping[str, float], name: str, digits: int = 2) -> str:
    return f"{metrics[name]:.{digits}f}" if name in metrics else "-"


def append_evaluation(file: Path, step: int, figures: Mapping[str, float]) -> None:
    """One JSON line {"step", ...figures}. Raises RunError when the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps({"step": step, **figures}) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from None


def drop_evaluations(file: Path, *, after: int) -> None:
    """Take out what an earlier attempt of the run measured after step `after`, from which this one goes on."""
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after]
    if kept != lines:
        publish_text(file, "".join(kept))
