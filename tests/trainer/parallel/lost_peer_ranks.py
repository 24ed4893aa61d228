"""Run by test_actor_parallel.py: rank 1 dies; rank 0 reports it with its phase, long before the deadline."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from collab_megatron.config.sections import OptimizerSection, ParallelSection
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import fail_together
from collab_megatron.trainer.actor.grid import init_grid
from collab_megatron.trainer.batching.micro_batch import split_by_tokens
from collab_megatron.trainer.loss.losses import sft_loss
from tests.trainer.parallel.tiny import make_samples


def main() -> None:
    grid = init_grid(ParallelSection(tensor=2, device="cpu", collective_timeout_s=60), seed=1)
    actor = Actor.build(Path(sys.argv[1]), dtype="float32", grid=grid, optimizer=OptimizerSection(), total_steps=1)
    if grid.rank == 1:
        os._exit(0)
    started = time.monotonic()
    batches = split_by_tokens(make_samples(2), micro_batch_tokens=99, pad_id=0)
    with pytest.raises(RunError, match=r"rank 0 \(tp 0\) in the training step: a peer died"):
        actor.train_step(batches, lambda logprobs, batch: sft_loss(logprobs, mask=batch.mask), 10)
    with pytest.raises(RunError, match=r"rank 0 .* in log-probs"):
        actor.logprobs(batches)
    with pytest.raises(RunError, match=r"rank 0 .* in a check: a peer died"), fail_together(grid, "a check", Path()):
        pass
    assert time.monotonic() - started < 20
    os._exit(0)  # the process groups cannot be left in order any more


if __name__ == "__main__":
    main()
