"""Ranks of test_ranks.py, in bf16: `gpu_ranks.py WORK DEVICE CASE ...`, cases of cases.py for one number of ranks.

WORK/<kind> are model folders. Rank 0 writes WORK/outcomes.jsonl: a line for each case that went well. The first that
does not ends all ranks with its traceback.

layout: log-probs, loss and gradient norm against transformers in fp32 on the same weights, then three training steps.
checkpoint: two steps, a save, two more; a second actor loads it and repeats the last two.
swap: the reference that is swapped in has the initial weights, and leaves those of the actor as they were.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection, ParallelSection
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.actor.reference import build_reference
from collab_megatron.trainer.batching.micro_batch import MicroBatch, collate, split_by_tokens
from collab_megatron.trainer.checkpoint.save_load import load_checkpoint, save_checkpoint
from collab_megatron.trainer.loss.policy_step import make_policy_loss, with_values
from tests.gpu.cases import CASES, OUTCOMES, Case
from tests.trainer.parallel.checkpoint_ranks import train, weights
from tests.trainer.parallel.plain import (
    ALGORITHMS,
    OPTIMIZER,
    SAMPLES,
    STEPS,
    load_plain,
    loss_fn,
    numbered,
    samples_for,
    statistics,
)

LOGPROB_BOUND = 0.06  # mean difference of a log-probability: one side rounds every layer to eight bits
RELATIVE_BOUND = 0.1  # of the loss and the gradient norm
REPEATED_BOUND = 1e-2  # relative, of a step that is taken twice: kernels of a GPU may add in any order
SMALL_CHUNK = 16 * 250 * 4  # bytes of fp32 logits: 16 tokens of the tiny vocabulary


def build(case: Case, work: Path, grid: RankGrid, steps: int = STEPS) -> Actor:
    actor = Actor.build(
        work / case.kind,
        dtype="bfloat16",
        grid=grid,
        optimizer=OPTIMIZER.model_copy(update=case.optimizer),
        total_steps=steps,
        recompute=case.recompute,
        entropy_gradient=ALGORITHMS[case.loss].entropy_coef > 0,
    )
    if case.chunked:
        for chunk in actor.chunks:
            chunk.logits_chunk_bytes = SMALL_CHUNK
    return actor


def micro_batches(case: Case, grid: RankGrid) -> list[MicroBatch]:
    algorithm = ALGORITHMS[case.loss]
    batches = split_by_tokens(
        samples_for(algorithm),
        micro_batch_tokens=80,
        pad_id=0,
        pad_multiple=grid.pad_multiple,
        packed=case.packed or case.share,
        share=case.share,
    )
    return [numbered(batch, algorithm) for batch in batches]


def layout(case: Case, work: Path, grid: RankGrid) -> None:
    actor, batches = build(case, work, grid), micro_batches(case, grid)
    plain = load_plain(work / case.kind).to(grid.device)
    algorithm = ALGORITHMS[case.loss]
    whole = collate(samples_for(algorithm), tuple(range(len(SAMPLES))), 0, 1, False)
    rows = numbered(whole, algorithm).to(grid.device)
    logprobs, entropy = statistics(plain, rows.ids)
    wanted = [values.detach().cpu() for values in rows.per_sample(logprobs)]
    for batch, found in zip(batches, actor.logprobs(batches)[0], strict=True):
        for sample, found_T in zip(batch.sample_indices, batch.per_sample(found), strict=True):
            mask_T = torch.tensor(SAMPLES[sample].mask)  # a shared prompt has no log-probs of its own
            gap = ((found_T - wanted[sample]).abs() * mask_T).sum() / mask_T.sum()
            assert gap < LOGPROB_BOUND, f"the log-probs of sample {sample} differ by {gap:.3g} on average"
    tokens = rows.num_trained_tokens
    wanted_loss = make_policy_loss(algorithm)(logprobs, with_values(rows, "entropy", entropy)).loss / tokens
    wanted_loss.backward()
    norm = math.sqrt(sum(float(weight.grad.float().pow(2).sum()) for weight in plain.parameters()))
    share = batches[grid.dp_rank :: grid.dp_size]
    of_ranks = make_policy_loss(algorithm, grid.sum_over_context)
    first, *others = [actor.train_step(share, of_ranks, tokens) for _ in range(STEPS)]
    assert not any(result.skipped for result in (first, *others))
    close("loss", first.metrics["loss"], float(wanted_loss), RELATIVE_BOUND)
    close("gradient norm", first.grad_norm, norm, RELATIVE_BOUND)


def close(what: str, found: float, wanted: float, bound: float) -> None:
    difference = abs(found - wanted) / max(abs(wanted), 0.1)  # the loss is what is left of terms of size 1
    assert difference < bound, f"{what}: {found:.5g} instead of {wanted:.5g}"


def checkpoint(case: Case, work: Path, grid: RankGrid) -> None:
    whole = build(case, work, grid, steps=8)
    for step in range(2):
        train(whole, step)
    saved = save_checkpoint(whole, work / "checkpoints" / case.name, step=2, extra={}, keep_last=1)
    at_two = weights(whole)
    wanted = [train(whole, step) for step in (2, 3)]
    again = build(case, work, grid, steps=8)
    assert load_checkpoint(again, saved).step == 2
    loaded = weights(again)
    assert [name for name, tensor in at_two.items() if not torch.equal(tensor, loaded[name])] == []
    for found, result in zip([train(again, step) for step in (2, 3)], wanted, strict=True):
        close("loss", found.metrics["loss"], result.metrics["loss"], REPEATED_BOUND)
        close("gradient norm", found.grad_norm, result.grad_norm, REPEATED_BOUND)
        assert found.lr == result.lr


def swap(case: Case, work: Path, grid: RankGrid) -> None:
    actor, batches = build(case, work, grid), micro_batches(case, grid)
    reference = build_reference(actor, AlgorithmSection(kl_coef=0.1, reference="swap"), logits_chunk_mb=64)
    assert reference is not None
    initial = actor.logprobs(batches)[0]
    tokens = sum(sum(sample.mask) for sample in SAMPLES)
    for _ in range(2):
        actor.train_step(batches[grid.dp_rank :: grid.dp_size], loss_fn, tokens)
    trained = actor.logprobs(batches)[0]
    assert alike(reference.logprobs(batches)[0], initial), "the reference does not have the initial weights"
    assert alike(actor.logprobs(batches)[0], trained), "the swap changed the actor's weights"
    assert not alike(trained, initial), "two steps changed nothing"


def alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    work, device, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    checks = {"layout": layout, "checkpoint": checkpoint, "swap": swap}
    for case in (CASES[name] for name in names):
        started = time.monotonic()
        print(case.name, flush=True)
        grid = init_grid(ParallelSection.read({"device": device, **case.parallel}, "parallel"), seed=1)
        checks[case.what](case, work, grid)
        is_main = grid.is_main
        close_grid(leave_world=case.name == names[-1])
        gc.collect()
        if is_main:
            with (work / OUTCOMES).open("a") as out:
                out.write(json.dumps({"case": case.name, "seconds": time.monotonic() - started}) + "\n")


if __name__ == "__main__":
    main()
