"""Supervised training as the user sees it: progress line and dashboard."""

from __future__ import annotations

from collections.abc import Mapping

from collab_megatron.actor.actor import StepResult
from collab_megatron.config import SFTConfig, dump_config
from collab_megatron.monitor.dashboard import Dashboard
from collab_megatron.monitor.progress import Progress
from collab_megatron.training.sft_data import SFTData
from collab_megatron.training.shares import Share

LOG_EVERY = 10
"""Steps between dashboard points and, times five, between progress lines: a step may take milliseconds."""


class SFTReporter:
    """For the trainer's rank 0."""

    def __init__(self, config: SFTConfig, *, first_step: int, data: SFTData) -> None:
        self._dashboard = Dashboard(config.run.tensorboard_dir, first_step=first_step)
        self._dashboard.text("config", dump_config(config))
        total = config.train.steps
        self._progress = Progress(config.run.name, first_step=first_step, total_steps=total, every=5 * LOG_EVERY)
        self._total = total
        epochs = total * config.batch_size / len(data)
        left_out = f", {data.num_left_out} left out" if data.num_left_out else ""
        print(f"{config.run.name}: {len(data)} conversations{left_out}, {epochs:.1f} epochs", flush=True)

    def step(
        self, done: int, result: StepResult, share: Share, trained_tokens: int, seconds: Mapping[str, float]
    ) -> None:
        """Figures of the step that has just ended; `done` counts from 1."""
        tokens_per_s = trained_tokens / max(seconds["time_s/update"], 1e-9)
        if done % LOG_EVERY == 0 or done == self._total:
            metrics = {f"train/{name}": value for name, value in result.metrics.items()}
            metrics |= {"train/grad_norm": result.grad_norm, "train/lr": result.lr, "train/tokens_per_s": tokens_per_s}
            metrics["train/dp_imbalance"] = share.imbalance
            self._dashboard.log(done, {**metrics, **seconds})
        self._progress.step(done, {"loss": f"{result.metrics['loss']:.3f}", "trained tokens/s": f"{tokens_per_s:,.0f}"})

    def close(self) -> None:
        self._dashboard.close()
