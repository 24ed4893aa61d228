"""DPO: the chosen reply of a pair against the rejected one, both relative to a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from collab_megatron.config import DPOConfig
from collab_megatron.data.pair_tokens import TokenPair, read_pair_rows
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.reference import build_reference
from collab_megatron.trainer.batching import MicroBatch, TokenSample
from collab_megatron.trainer.loss.dpo import PAIR, make_dpo_loss, means_of_pairs, pair_samples
from collab_megatron.trainer.loss.losses import LossSum
from collab_megatron.trainer.rank_batch import attach_logprobs
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.supervised.data import RowKind, StepBatch, SupervisedData
from collab_megatron.trainer.supervised.held_out import HeldOutPairs, sums_of_all_ranks

MEASURED = ("loss", "pair_accuracy", "reward_margin")


def _samples(pairs: Sequence[TokenPair]) -> list[TokenSample]:
    return [
        sample
        for number, pair in enumerate(pairs)
        for sample in pair_samples(number, chosen=pair.chosen, rejected=pair.rejected, prompt=pair.prompt)
    ]


PAIRS = RowKind("pairs", read_pair_rows, _samples, unit=PAIR)


class DPOObjective:
    """See objective.py. The reference has the weights of model.path."""

    passes = 4  # the reference's too

    def __init__(self, config: DPOConfig, actor: Actor) -> None:
        self._actor = actor
        self._reference = build_reference(actor, config.dpo.reference, logits_chunk_mb=config.train.logits_chunk_mb)
        self.data = SupervisedData(config, actor.grid, actor.spec, PAIRS)
        self._loss = make_dpo_loss(config.dpo.beta)

    def micro_batches(self, batch: StepBatch, timer: PhaseTimer) -> list[MicroBatch]:
        with timer("logprobs"):
            return attach_logprobs(batch.rank.micro_batches, "ref_logprobs", self._reference)

    def normalizer(self, batch: StepBatch) -> float:
        return batch.rows

    def loss(self, logprobs: Tensor, batch: MicroBatch) -> LossSum:
        return self._loss(logprobs, batch)

    def figures(self, metrics: Mapping[str, float], batch: StepBatch) -> dict[str, float]:
        return means_of_pairs(metrics, pairs=batch.rows, tokens=batch.trained_tokens)

    def shown(self, figures: Mapping[str, float]) -> dict[str, str]:
        return {
            "loss": f"{figures['loss']:.3f}",
            "pairs ranked right": f"{figures['pair_accuracy']:.1%}",
            "margin": f"{figures['reward_margin']:.3f}",
        }

    def held_out(self) -> HeldOutPairs:
        data = self.data
        sums = sums_of_all_ranks(self._actor.grid, data.held_out_batches(), self._measure, len(MEASURED))
        loss, accuracy, margin = (total / data.num_held_out for total in sums)
        return HeldOutPairs(loss, accuracy, margin, data.held_out_tokens, data.num_held_out)

    def _measure(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The sums of MEASURED over pairs, in float64."""
        batches = attach_logprobs(micro_batches, "ref_logprobs", self._reference)
        logprobs, _ = self._actor.logprobs(batches)
        total = torch.zeros(len(MEASURED), dtype=torch.float64)
        for batch, found in zip(batches, logprobs, strict=True):
            result = self.loss(found.double(), batch)
            named: dict[str, Tensor] = {"loss": result.loss, **result.metrics}
            total += torch.stack([named[name].detach() for name in MEASURED])
        return total
