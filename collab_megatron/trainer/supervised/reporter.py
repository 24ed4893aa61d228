"""Reports of a supervised run to the user: progress line and dashboard."""

from __future__ import annotations

from collections.abc import Mapping

from collab_megatron.config import SupervisedConfig, show_config
from collab_megatron.trainer.actor.actor import StepResult
from collab_megatron.trainer.report.dashboard import Dashboard
from collab_megatron.trainer.report.progress_line import ProgressLine, steps_between
from collab_megatron.trainer.supervised.data import StepBatch
from collab_megatron.trainer.supervised.held_out import HeldOut
from collab_megatron.trainer.supervised.objective import Objective
from collab_megatron.trainer.utilization import utilization

MOST_LINES, MOST_POINTS = 100, 1000
"""The most lines on the terminal and points on the dashboard in a whole run: a step may take milliseconds."""
PASSES = ("time_s/logprobs", "time_s/update")
"""Times of a step in which the model runs."""


class SupervisedReporter:
    """For the trainer's rank 0."""

    def __init__(self, config: SupervisedConfig, *, first_step: int, objective: Objective, attempt: int = 1) -> None:
        self._dashboard = Dashboard(config.run.tensorboard_dir, first_step=first_step, attempt=attempt)
        self._dashboard.text("config", show_config(config))
        self._name, self._objective, self._data = config.run.name, objective, objective.data
        self._parallel, self._model = config.parallel, config.model
        total, data = config.train.steps, objective.data
        self._progress = ProgressLine(
            config.run.name, first_step=first_step, total_steps=total, every=steps_between(total, MOST_LINES)
        )
        self._total, self._every = total, steps_between(total, MOST_POINTS)
        epochs = total * config.batch_size / len(data)
        held_out = f", {data.num_held_out:,} held out" if data.num_held_out else ""
        print(f"{config.run.name}: {len(data):,} {data.noun}{held_out}, {epochs:.1f} epochs", flush=True)
        for notice in data.notices:
            print(f"{config.run.name}: {notice}", flush=True)

    def step(self, done: int, result: StepResult, batch: StepBatch, seconds: Mapping[str, float]) -> None:
        """Report a finished step; `done` counts from 1."""
        tokens_per_s = batch.trained_tokens / max(seconds["time_s/update"], 1e-9)
        figures = self._objective.figures(result.metrics, batch)
        if done % self._every == 0 or done == self._total:
            metrics = {f"train/{name}": value for name, value in figures.items()}
            metrics |= {"train/grad_norm": result.grad_norm, "train/lr": result.lr, "train/tokens_per_s": tokens_per_s}
            metrics["train/dp_imbalance"] = batch.rank.imbalance
            tflop = self._objective.passes * batch.rank.forward_flops / 1e12
            passes_s = sum(seconds.get(phase, 0.0) for phase in PASSES)
            metrics |= utilization(tflop, passes_s, self._parallel, self._model)
            metrics[f"data/{self._data.noun}_left_out"] = self._data.left_out
            metrics[f"data/{self._data.noun}_left_out_share"] = self._data.share_left_out
            self._dashboard.log(done, {**metrics, **seconds})
        shown = self._objective.shown(figures)
        self._progress.step(done, {**shown, "trained tokens/s": f"{tokens_per_s:,.0f}"})

    def to_disk(self) -> None:
        """Force the figures to the disk; call it before a checkpoint. Raises RunError if the disk refuses."""
        self._dashboard.to_disk()

    def saved(self, done: int, seconds: Mapping[str, float]) -> None:
        """Times of a checkpoint of `done` steps, which is written or, with train.async_save, under way."""
        self._dashboard.log(done, seconds)

    def evaluation(self, step: int, found: HeldOut, *, best: bool, seconds: float) -> None:
        """Report the held-out loss of the weights after `step` steps. best: it is the lowest so far."""
        self._progress.pause(seconds)
        self._dashboard.log(step, {**found.metrics(), "time_s/evaluation": seconds})
        print(
            f"{self._name}: held-out loss {found.loss:.4f} after step {step}{', the lowest so far' if best else ''} "
            f"({found.described})",
            flush=True,
        )

    def exported(self, step: int, folder: object) -> None:
        print(f"{self._name}: the weights after step {step} are in {folder}", flush=True)

    def close(self) -> None:
        self._dashboard.close()
