"""Run by test_layouts.py: cases of layouts.py for this number of processes, one after the other.

    layout_ranks.py WORK [CASE ...]      without names: all

WORK/<kind> are model folders with their reference (plain.py). Rank 0 writes WORK/outcomes-<processes>.jsonl: a line for
each case that gave the same numbers. The first that does not ends all ranks with its traceback.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from collab_megatron.config.sections import ParallelSection
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.batching.micro_batch import MicroBatch, collate
from collab_megatron.trainer.convert.loader import SafetensorsFolder
from collab_megatron.trainer.loss.policy_step import make_policy_loss
from collab_megatron.trainer.supervised.held_out import mean_loss
from tests.trainer.parallel.layouts import CASES, Case
from tests.trainer.parallel.plain import ALGORITHMS, OPTIMIZER, SAMPLES, STEPS, numbered, samples_for

TOLERANCE = 1e-5
SCALE = 0.1
"""Smallest scale a difference is held against: the policy loss is what is left of terms of size 1 of both signs."""


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-2)).item()


def micro_batches(case: Case, grid: RankGrid) -> list[MicroBatch]:
    """This data rank's samples, `rows` at a time. Unequal shares, so that an average over data ranks would show."""
    mine = list(range(len(SAMPLES))) if grid.dp_size == 1 else ([0, 1, 2], [3, 4, 5, 6, 7])[grid.dp_rank]
    parts = [mine[i : i + case.rows] for i in range(0, len(mine), case.rows)]
    packed, share = case.packed or case.share, case.share
    algorithm = ALGORITHMS[case.loss]
    samples = samples_for(algorithm)
    batches = [collate([samples[i] for i in part], tuple(part), 0, grid.pad_multiple, packed, share) for part in parts]
    return [numbered(batch, algorithm) for batch in batches]


def compare_statistics(actor: Actor, batches: list[MicroBatch], wanted: dict[str, list[Tensor]]) -> float:
    """Log-probs (and entropies where `wanted` has them) of every trained token, relative; all others have exactly 0."""
    worst = 0.0
    for name, found in zip(("logprobs", "entropies"), actor.logprobs(batches), strict=True):
        if name not in wanted:
            continue
        for batch, values in zip(batches, found, strict=True):
            assert values.shape == batch.ids.shape
            assert values.dtype == torch.float32
            for sample, found_T in zip(batch.sample_indices, batch.per_sample(values), strict=True):
                mask_T = torch.tensor(SAMPLES[sample].mask)
                assert not found_T[mask_T == 0].any()
                worst = max(worst, relative(found_T, wanted[name][sample] * mask_T))
    assert worst < TOLERANCE, f"{'/'.join(wanted)} differ by {worst}"
    return worst


def check(case: Case, work: Path) -> dict[str, float]:
    folder = work / case.kind
    reference = torch.load(folder / f"{case.loss}.pt", weights_only=True)
    grid = init_grid(ParallelSection(device="cpu", collective_timeout_s=60, **case.parallel), seed=1)
    section = OPTIMIZER.model_copy(update=case.optimizer or {})
    actor = Actor.build(
        folder,
        dtype="float32",
        grid=grid,
        optimizer=section,
        total_steps=STEPS,
        recompute=case.recompute,  # type: ignore[arg-type]
        entropy_gradient=ALGORITHMS[case.loss].entropy_coef > 0,
    )
    # gloo would send what is in the freed memory by then; whether it does here depends on the machine's load
    assert not any(chunk.config.deallocate_pipeline_outputs for chunk in actor.chunks)
    loss_fn = make_policy_loss(ALGORITHMS[case.loss], grid.sum_over_context)
    for chunk in actor.chunks:
        chunk.logits_chunk_bytes = case.logits_chunk_bytes
    batches = micro_batches(case, grid)
    tokens = sum(sum(sample.mask) for sample in SAMPLES)
    worst = {"before": compare_statistics(actor, batches, {k: reference[k] for k in ("logprobs", "entropies")})}
    wanted = -sum(
        (values * torch.tensor(s.mask)).sum() for s, values in zip(SAMPLES, reference["logprobs"], strict=True)
    )
    found_loss = mean_loss(actor, [batches], int(tokens))  # over all ranks' samples, as one process has it
    worst["held_out"] = abs(found_loss - wanted.item() / tokens) / abs(found_loss)
    assert worst["held_out"] < TOLERANCE, f"the held-out loss is {found_loss} instead of {wanted.item() / tokens}"
    for step, report in enumerate(reference["reports"]):
        result = actor.train_step(batches, loss_fn, tokens)
        assert not result.skipped
        found = {**result.metrics, **result.largest, "norm": result.grad_norm, "lr": result.lr}
        assert found.keys() == report.keys()
        for name, wanted in report.items():
            difference = abs(found[name] - wanted) / max(abs(wanted), SCALE)
            worst[name] = max(worst.get(name, 0.0), difference)
            assert difference < TOLERANCE, f"step {step}, {name}: {found[name]} instead of {wanted}"
    worst["after"] = compare_statistics(actor, batches, {"logprobs": reference["after"]})
    worst["weights"] = compare_weights(actor, folder / f"trained-{case.loss}")
    close_grid(leave_world=False)
    return worst


def compare_weights(actor: Actor, trained: Path) -> float:
    """All of them on rank 0, elsewhere those of the stage; the largest relative difference."""
    plan = {info.name: info for info in actor.tensor_plan()}
    worst, seen = 0.0, 0
    with SafetensorsFolder(trained) as wanted:
        for name, tensor in actor.hf_tensors():
            difference = relative(tensor, wanted.read(name, plan[name].shape, None, 0, 0))
            worst, seen = max(worst, difference), seen + 1
            assert difference < TOLERANCE, f"{name} differs by {difference}"
    assert seen == len(plan) or not actor.grid.is_main
    return worst


def main() -> None:
    work, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    only = sys.argv[2:]
    for case in CASES[processes]:
        if only and case.name not in only:
            continue
        started = time.monotonic()
        print(case.name, flush=True)
        worst = check(case, work)
        if os.environ["RANK"] == "0":
            with (work / f"outcomes-{processes}.jsonl").open("a") as out:
                out.write(json.dumps({"case": case.name, "seconds": time.monotonic() - started, **worst}) + "\n")


if __name__ == "__main__":
    main()
