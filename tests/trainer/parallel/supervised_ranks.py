"""Run by test_supervised_parallel.py: SFT and DPO steps of real ranks against plain_supervised.py.

    supervised_ranks.py WORK CASES

WORK is a model folder with the references. CASES is a JSON list of {"objective", "parallel", "train", "reference"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from collab_megatron.config.sections import ParallelSection, TrainSection
from collab_megatron.trainer.actor.actor import Actor, LossFn
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.actor.reference import build_reference
from collab_megatron.trainer.batching import MicroBatch
from collab_megatron.trainer.loss.dpo import PAIR, make_dpo_loss, means_of_pairs
from collab_megatron.trainer.loss.losses import sft_loss
from collab_megatron.trainer.rank_batch import attach_logprobs, rank_batch
from collab_megatron.trainer.supervised.dpo import PAIRS as PAIRS_OF_ROWS
from collab_megatron.trainer.supervised.sft import CONVERSATIONS
from tests.trainer.parallel.layout_ranks import SCALE, TOLERANCE, compare_weights
from tests.trainer.parallel.plain import OPTIMIZER, STEPS
from tests.trainer.parallel.plain_supervised import BETA, PAIRS, ROWS, trained_tokens

SUM_SCALE = 1.0


def check(work: Path, case: dict[str, Any], grid: RankGrid) -> float:
    """The largest relative difference of a figure or a weight."""
    name, train = case["objective"], TrainSection(**case["train"])
    actor = Actor.build(work, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    if name == "sft":
        batch = rank_batch(grid, actor.spec, CONVERSATIONS.samples(ROWS), train)
        normalizer, tokens = trained_tokens(ROWS), trained_tokens(ROWS)
        loss_fn: LossFn = lambda logprobs, micro: sft_loss(logprobs, mask=micro.mask)  # noqa: E731
    else:
        reference = build_reference(actor, case["reference"], logits_chunk_mb=64)
        batch = rank_batch(grid, actor.spec, PAIRS_OF_ROWS.samples(PAIRS), train, unit=PAIR)
        normalizer, tokens = len(PAIRS), trained_tokens([row for pair in PAIRS for row in pair[:2]])
        loss_fn = make_dpo_loss(BETA)
    worst = 0.0
    for step, report in enumerate(torch.load(work / f"{name}.pt", weights_only=True)):
        micro: list[MicroBatch] = batch.micro_batches
        if name == "dpo":
            micro = attach_logprobs(micro, "ref_logprobs", reference)
        result = actor.train_step(micro, loss_fn, normalizer)
        metrics = means_of_pairs(result.metrics, pairs=normalizer, tokens=tokens)
        found = {**metrics, "norm": result.grad_norm, "lr": result.lr}
        for figure, wanted in report.items():
            # an implicit reward is a difference of sums over a reply's tokens, and begins at 0
            scale = SUM_SCALE if figure.startswith("reward") else SCALE
            difference = abs(found[figure] - wanted) / max(abs(wanted), scale)
            assert difference < TOLERANCE, f"{case}, step {step}: {figure} is {found[figure]} instead of {wanted}"
            worst = max(worst, difference)
    return max(worst, compare_weights(actor, work / name))


def main() -> None:
    work, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for case in cases:
        grid = init_grid(ParallelSection(device="cpu", collective_timeout_s=60, **case["parallel"]), seed=1)
        print(f"{case}: {check(work, case, grid):.1e}", flush=True)
        close_grid(leave_world=False)


if __name__ == "__main__":
    main()
