"""Reports of an RL run to the user: progress line, dashboard, evaluation file, warnings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from collab_megatron.config import RLConfig, show_config
from collab_megatron.errors import RunError
from collab_megatron.files import fsync
from collab_megatron.json_lines import append_rows, keep_rows
from collab_megatron.trainer.report.alarms import Alarms
from collab_megatron.trainer.report.dashboard import Dashboard, first_again, read_metrics
from collab_megatron.trainer.report.length_drift import LengthDrift
from collab_megatron.trainer.report.progress_line import ProgressLine
from collab_megatron.trainer.sync.publisher import SyncReport
from collab_megatron.trainer.utilization import utilization
from collab_megatron.types import ShownTree, TrainingSample

logger = logging.getLogger(__name__)

SHOWN_STEPS = 50  # of a run, about: steps whose trees are on the dashboard
TREES: Sequence[Sequence[str]] = ((), ("best",), ("best", "worst"), ("best", "median", "worst"))

OFF_POLICY = """This run trains on recorded conversations (replay.record in the config), which other weights may have
sampled. Figures named recorded/... are of those conversations, not of the policy in training.
train/logprob_gap, train/importance_weight and train/importance_effective_share show how far the policy is from the one
that sampled them. No token counts as on-policy."""


class RLReporter:
    """For the trainer's rank 0."""

    def __init__(self, config: RLConfig, *, first_step: int, attempt: int = 1) -> None:
        self._evaluations = config.run.evaluations_file
        drop_evaluations(self._evaluations, first=first_again(first_step))
        self._dashboard = Dashboard(config.run.tensorboard_dir, first_step=first_step, attempt=attempt)
        self._dashboard.text("config", show_config(config))
        self._dashboard.first_page()
        if config.replay is not None:
            self._dashboard.text("off-policy", OFF_POLICY)
        self._dashboard.settings(compared_settings(config), ("reward/mr_mean", "eval/mr"))
        self._progress = ProgressLine(config.run.name, first_step=first_step, total_steps=config.train.steps)
        self._alarms = Alarms()
        self._show_every = max(1, config.train.steps // SHOWN_STEPS)
        self._drift = LengthDrift(read_metrics(config.run.tensorboard_dir))
        self._parallel, self._model = config.parallel, config.model
        self._weighted = [name for name in config.reward.metric_weights if config.reward.metric_weights[name]]
        self._users = list(config.evaluation.users)
        self._failed_evaluations = 0
        self._unfinished: tuple[int, dict[str, float]] | None = None  # a trained step that `step` has not reported yet

    def trained(self, done: int, rollout: Mapping[str, float], update: Mapping[str, float]) -> None:
        """Keep the figures of a step that is trained, until `step` reports it or a checkpoint needs them."""
        self._unfinished = done, {**rollout, **update}

    def to_disk(self) -> None:
        """Write the figures of all trained steps to the disk; call it before a checkpoint. Raises RunError if the disk
        refuses."""
        if self._unfinished is not None:
            self._dashboard.log(*self._unfinished)
            self._unfinished = None  # after the write: if the disk refuses, the next try writes it
        self._dashboard.to_disk()

    def saved(self, done: int, seconds: Mapping[str, float]) -> None:
        """Times of a checkpoint of `done` steps, which is written or, with train.async_save, under way."""
        self._dashboard.log(done, seconds)

    def step(
        self,
        done: int,
        rollout: Mapping[str, float],
        update: Mapping[str, float],
        sync: SyncReport | None,
        seconds: Mapping[str, float],
        samples: Sequence[TrainingSample] = (),
        shown: Sequence[ShownTree] = (),
    ) -> None:
        """Report a finished step; `done` counts from 1. sync: None without engines. samples: the step's, for the
        histograms. shown: its best, median and worst tree; of long runs not every step's."""
        metrics = {**rollout, **update, **seconds}
        metrics |= sync.metrics() if sync is not None else {}
        metrics["train/tokens_per_s"] = update["train/tokens"] / max(seconds["time_s/update"], 1e-9)
        if "train/model_tflop" in update:  # not after a step without samples
            passes_s = seconds["time_s/logprobs"] + seconds["time_s/update"]
            metrics |= utilization(update["train/model_tflop"], passes_s, self._parallel, self._model)
        metrics |= memory_shares() | self._drift.figures(done, metrics)
        self._dashboard.log(done, metrics)
        self._unfinished = None
        self._dashboard.distribution(done, "distribution/reward", [sample.reward for sample in samples])
        self._dashboard.distribution(done, "distribution/advantage", [sample.advantage for sample in samples])
        self._dashboard.distribution(done, "distribution/reply_tokens", [len(s.reply_ids_T) for s in samples])
        if done == 1 or done % self._show_every == 0:
            for name, tree in zip(TREES[len(shown)], shown, strict=True):
                self._dashboard.text(f"trees/{name}", tree.text, done)
        self._progress.step(done, progress_figures(metrics, self._weighted))
        for sentence in self._alarms.check(done, metrics):
            logger.warning("%s", sentence)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Report held-out figures of the weights after `step` steps."""
        self._progress.pause(figures.get("wall_s", 0.0))
        named = {f"eval/{name}": value for name, value in figures.items()}
        self._dashboard.log(step, {**named, "eval/failed": self._failed_evaluations})
        append_evaluation(self._evaluations, step, figures)
        names = [*self._weighted, "clarify_rate_ambiguous", "clarify_rate_complete", "mr"]
        names += [f"users/{user}/{self._weighted[0]}" for user in self._users]
        shown = ", ".join(f"{name} {figures[name]:.3f}" for name in names if name in figures)
        print(f"held-out after step {step}: {shown} ({int(figures['conversations'])} conversations)", flush=True)

    def evaluation_failed(self, step: int, why: str) -> None:
        """Report that the weights after `step` steps have no held-out figures; training goes on."""
        self._failed_evaluations += 1
        self._dashboard.log(step, {"eval/failed": self._failed_evaluations})
        logger.warning("the evaluation after step %d failed and training goes on: %s", step, why)

    def close(self) -> None:
        self._dashboard.close()


def compared_settings(config: RLConfig) -> dict[str, float | str]:
    """What runs are compared by: model, seed, and all numbers, switches and words of the sections that shape learning;
    by dotted key."""
    found: dict[str, float | str] = {"model.path": config.model.path, "run.seed": config.run.seed}

    def add(prefix: str, values: Mapping[str, object]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                add(f"{prefix}.{key}", value)
            elif isinstance(value, int | float | str):
                found[f"{prefix}.{key}"] = value

    for name in ("algorithm", "optimizer", "reward", "rollout", "driver"):
        add(name, getattr(config, name).model_dump())
    return found


def progress_figures(metrics: Mapping[str, float], weighted: Sequence[str]) -> dict[str, str]:
    """Figures of the progress line, in order: reward, this run's weighted metrics, how often replies ask, KL, margin of
    online DPO, speed.

    Figures that the step does not have are left out."""
    named = {"reward": "reward/mr_mean", "recorded reward": "recorded/reward/mr_mean"} | {
        name: f"reward/{name}_mean" for name in weighted
    }
    if "rollout/clarify_rate_ambiguous" in metrics or "rollout/clarify_rate_complete" in metrics:
        named |= {
            "asks if unclear": "rollout/clarify_rate_ambiguous",
            "asks if clear": "rollout/clarify_rate_complete",
        }
    else:
        named["asks"] = "rollout/clarify_rate"
    named |= {"kl": "train/kl", "margin": "train/reward_margin"}
    if "replay/recorded_step" in metrics:
        named["log-prob gap"] = "train/logprob_gap"
    shown = {name: f"{metrics[figure]:.2f}" for name, figure in named.items() if figure in metrics}
    if "rollout/tokens_per_s" in metrics:
        shown["tokens/s"] = f"{metrics['rollout/tokens_per_s']:,.0f}"
    return shown


def memory_shares() -> dict[str, float]:
    """Used shares of this machine's memory and, where there is one, of this process's GPU memory; 1 is full."""
    memory = psutil.virtual_memory()
    shares = {"system/host_memory_share": 1 - memory.available / memory.total}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        shares["system/gpu_memory_share"] = 1 - free / total
    return shares


def append_evaluation(file: Path, step: int, figures: Mapping[str, float]) -> None:
    """Append one JSON line {"step", ...figures}. Raises RunError if the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        append_rows(file, [{"step": step, **figures}])
        fsync(file)  # an evaluation takes minutes and money
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from None


def drop_evaluations(file: Path, *, first: int) -> None:
    """Remove the evaluations from step `first` on: this attempt of the run measures them again.

    Raises UserError for a damaged line, RunError if the disk refuses.
    """
    try:
        keep_rows(file, lambda row: row["step"] < first, numbers=("step",))
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from None
