"""Objective: what supervised training minimizes, with its data, its figures and its held-out loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from collab_megatron.trainer.batching import MicroBatch
from collab_megatron.trainer.loss.losses import LossSum
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.supervised.data import StepBatch, SupervisedData
from collab_megatron.trainer.supervised.held_out import HeldOut


class Objective(Protocol):
    """Built on every rank before a checkpoint is loaded. sft.py and dpo.py have one each."""

    data: SupervisedData[Any]
    passes: int  # of the model over a batch; a backward pass counts as two

    def micro_batches(self, batch: StepBatch, timer: PhaseTimer) -> list[MicroBatch]:
        """The batch with all that `loss` reads. Collective over the ranks that share the model."""
        ...

    def normalizer(self, batch: StepBatch) -> float:
        """Divisor of the step's sums: the things that the loss is a mean over, of all ranks."""
        ...

    def loss(self, logprobs: Tensor, batch: MicroBatch) -> LossSum:
        """As Actor.train_step asks for."""
        ...

    def figures(self, metrics: Mapping[str, float], batch: StepBatch) -> dict[str, float]:
        """The step's metrics (StepResult.metrics) as means, by name."""
        ...

    def shown(self, figures: Mapping[str, float]) -> dict[str, str]:
        """The figures of the progress line."""
        ...

    def held_out(self) -> HeldOut:
        """Measure the held-out rows with the current weights. Collective over all ranks."""
        ...
