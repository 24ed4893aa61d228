"""SFT: the negative log-likelihood of the assistant tokens of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from collab_megatron.config import SFTConfig
from collab_megatron.data.sft_tokens import TokenRow, read_sft_rows
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.batching import MicroBatch, TokenSample
from collab_megatron.trainer.loss.losses import LossSum, sft_loss
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.supervised.data import RowKind, StepBatch, SupervisedData
from collab_megatron.trainer.supervised.held_out import HeldOutLoss, mean_loss


def _samples(rows: Sequence[TokenRow]) -> list[TokenSample]:
    return [TokenSample(ids=row.ids, mask=[float(trained) for trained in row.mask]) for row in rows]


CONVERSATIONS = RowKind("conversations", read_sft_rows, _samples)


class SFTObjective:
    """See objective.py."""

    passes = 3

    def __init__(self, config: SFTConfig, actor: Actor) -> None:
        self._actor = actor
        self.data = SupervisedData(config, actor.grid, actor.spec, CONVERSATIONS)

    def micro_batches(self, batch: StepBatch, timer: PhaseTimer) -> list[MicroBatch]:
        return batch.rank.micro_batches

    def normalizer(self, batch: StepBatch) -> float:
        return batch.trained_tokens

    def loss(self, logprobs: Tensor, batch: MicroBatch) -> LossSum:
        return sft_loss(logprobs, mask=batch.mask)

    def figures(self, metrics: Mapping[str, float], batch: StepBatch) -> dict[str, float]:
        return dict(metrics)

    def shown(self, figures: Mapping[str, float]) -> dict[str, str]:
        return {"loss": f"{figures['loss']:.3f}"}

    def held_out(self) -> HeldOutLoss:
        data = self.data
        loss = mean_loss(self._actor, data.held_out_batches(), data.held_out_tokens)
        return HeldOutLoss(loss, data.held_out_tokens, data.num_held_out)
