"""Run by test_on_gpu.py on one or more GPUs: log-probs of one layout against transformers, and three training steps.

gpu_ranks.py MODEL key=value ...        (keys of ParallelSection, and packed=true)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from collab_megatron.config.sections import ParallelSection
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import close_grid, init_grid
from collab_megatron.trainer.batching.micro_batch import split_by_tokens
from tests.trainer.parallel.plain import OPTIMIZER, STEPS, loss_fn, statistics
from tests.trainer.parallel.tiny import make_samples

BF16_BOUND = 0.06  # mean difference of a log-probability; both sides round every layer to eight bits


def main() -> None:
    folder = Path(sys.argv[1])
    options = dict(option.split("=") for option in sys.argv[2:])
    packed = options.pop("packed", "false") == "true"
    grid = init_grid(ParallelSection(device="cuda", **options), seed=1)
    actor = Actor.build(folder, dtype="bfloat16", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(grid.device)
    samples, multiple = make_samples(8), grid.pad_multiple
    batches = split_by_tokens(samples, micro_batch_tokens=80, pad_id=0, pad_multiple=multiple, packed=packed)
    rows = split_by_tokens(samples, micro_batch_tokens=10**6, pad_id=0)[0]
    with torch.no_grad():
        wanted_rows = rows.per_sample(statistics(plain, rows.ids.to(grid.device))[0].cpu())
    wanted = dict(zip(rows.sample_indices, wanted_rows, strict=True))
    for batch, found in zip(batches, actor.logprobs(batches)[0], strict=True):
        for index, found_T in zip(batch.sample_indices, batch.per_sample(found), strict=True):
            assert (found_T - wanted[index]).abs().mean() < BF16_BOUND
    share = batches[grid.dp_rank :: grid.dp_size]
    losses = [actor.train_step(share, loss_fn, 80.0) for _ in range(STEPS)]
    assert not any(result.skipped for result in losses)
    close_grid()


if __name__ == "__main__":
    main()
