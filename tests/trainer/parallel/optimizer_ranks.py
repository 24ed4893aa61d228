"""Run by test_optimizer_parallel.py on two data ranks: options that must not change the numbers.

    optimizer_ranks.py WORK

WORK/<kind> are model folders. A plain optimizer is the reference: offload and recomputation equal it bit for bit, since
they do the same arithmetic elsewhere or a second time (but for full recomputation in bf16); overlap to 1e-6.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import collab_megatron.trainer.actor.optimizer as optimizer_module
from collab_megatron.config.sections import OptimizerSection, ParallelSection
from collab_megatron.trainer.actor.actor import Actor, StepResult
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.actor.offload import HostMaster, OffloadedAdamW
from collab_megatron.trainer.actor.optimizer import parts
from collab_megatron.trainer.batching.micro_batch import MicroBatch, split_by_tokens
from collab_megatron.trainer.checkpoint.save_load import load_checkpoint, save_checkpoint
from collab_megatron.trainer.loss.losses import LossSum, sft_loss
from tests.trainer.parallel.tiny import make_samples

STEPS = 3


def loss_fn(logprobs: Tensor, batch: MicroBatch) -> LossSum:
    return sft_loss(logprobs, mask=batch.mask)


def micro_batches(grid: RankGrid) -> tuple[list[MicroBatch], float]:
    samples = make_samples(8, seed=1)
    mine = split_by_tokens(samples[grid.dp_rank :: grid.dp_size], micro_batch_tokens=60, pad_id=0)
    return mine, sum(sum(sample.mask) for sample in samples)


def build(
    folder: Path, grid: RankGrid, dtype: Literal["float32", "bfloat16"], recompute: Any = "none", **changes: Any
) -> Actor:
    section = OptimizerSection(lr=1e-3, schedule="cosine", weight_decay=0.1, clip_grad=0.5, **changes)
    return Actor.build(folder, dtype=dtype, grid=grid, optimizer=section, total_steps=8, recompute=recompute)


def train(actor: Actor, steps: int) -> list[StepResult]:
    batches, tokens = micro_batches(actor.grid)
    results = [actor.train_step(batches, loss_fn, tokens) for _ in range(steps)]
    assert not any(result.skipped for result in results)
    assert results[0].grad_norm > 0.5, "clipping is not tried"
    return results


def outcome(actor: Actor) -> tuple[list[StepResult], list[Tensor], dict[str, Tensor]]:
    """What STEPS steps reported, and the log-probs and weights after them."""
    results = train(actor, STEPS)
    return results, actor.logprobs(micro_batches(actor.grid)[0])[0], weights(actor)


def weights(actor: Actor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in actor.hf_tensors()}


def check_equal(found: Any, wanted: Any, what: str) -> None:
    assert found[0] == wanted[0], f"{what}: {found[0]} instead of {wanted[0]}"
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True)), f"{what}: log-probs"
    assert all(torch.equal(found[2][name], tensor) for name, tensor in wanted[2].items()), f"{what}: weights"


def check_close(found: Any, wanted: Any, what: str, tolerance: float) -> None:
    """tolerance: of a gradient norm and a loss, relative; of weights and log-probs ten times that, of their norm."""
    for one, other in zip(found[0], wanted[0], strict=True):
        assert abs(one.grad_norm / other.grad_norm - 1) < tolerance, f"{what}: {one} instead of {other}"
        assert abs(one.metrics["loss"] / other.metrics["loss"] - 1) < tolerance, f"{what}: {one} instead of {other}"
    pairs = [(found[2][name], tensor) for name, tensor in wanted[2].items()]
    for one, other in [*pairs, *zip(found[1], wanted[1], strict=True)]:
        error = float((one.double() - other.double()).norm() / other.double().norm())
        assert error < 10 * tolerance, f"{what}: differs by {error}"


def check_variants(folder: Path, grid: RankGrid, dtype: Any, distributed: bool) -> None:
    plain = outcome(build(folder, grid, dtype, distributed=distributed))
    for recompute in ("selective", "full"):
        actor = build(folder, grid, dtype, recompute, distributed=distributed)
        if recompute == "full" and dtype == "bfloat16":
            # its first pass is without gradients, where attention over short rows rounds elsewhere (local/layers.py)
            check_close(outcome(actor), plain, "recompute full", tolerance=2e-3)
        else:
            check_equal(outcome(actor), plain, f"recompute {recompute}")
    for changes in ({"cpu_offload": 1.0}, {"overlap": True}, {"cpu_offload": 0.5, "overlap": True}):
        what = f"{dtype}, distributed {distributed}, {changes}"
        actor = build(folder, grid, dtype, distributed=distributed, **changes)
        assert actor.wrapped[0].ddp_config.overlap_grad_reduce == ("overlap" in changes)
        assert not changes.get("overlap") or len(actor.wrapped[0].bucket_groups) > 1, "one bucket overlaps with nothing"
        if (
            "overlap" in changes
        ):  # with buckets a rank owns other pieces of the gradient: its norm is added up otherwise
            check_close(outcome(actor), plain, what, tolerance=1e-6)
        else:
            check_equal(outcome(actor), plain, what)
        if "cpu_offload" in changes:
            check_offloaded(actor, float(changes["cpu_offload"]), what)
        assert actor.not_finite() is None, what
        if grid.rank == 1:  # wherever a rank's masters are
            parts(actor.optimizer)[0].get_parameters()[-1].data.view(-1)[-1] = torch.inf
        assert actor.not_finite() is not None, what


def check_offloaded(actor: Actor, share: float, what: str) -> None:
    for part in parts(actor.optimizer):
        inner = part.optimizer
        assert isinstance(inner, OffloadedAdamW)
        every = part.get_parameters()
        found = inner.host_numel / sum(p.numel() for p in every)
        assert share - 0.05 <= found <= share, f"{what}: {found} of the weights are stepped on the host"
        masters = sum(p.numel() for p in every if isinstance(p, HostMaster))
        # in fp32 the weight is its own master, and stays on the device
        assert masters == (inner.host_numel if actor.dtype == torch.bfloat16 else 0), what


def check_gather(folder: Path, grid: RankGrid) -> None:
    """With overlap the weights of other ranks are old after a step until somebody asks for them."""
    actor = build(folder, grid, "bfloat16", distributed=True, overlap=True)
    train(actor, 1)
    raw = torch.cat([p.detach().flatten() for p in actor.chunks[0].parameters()]).float()
    assert _differs_between_ranks(raw, grid)
    actor.gather_weights()
    whole = torch.cat([p.detach().flatten() for p in actor.chunks[0].parameters()]).float()
    assert not torch.equal(raw, whole)
    assert not _differs_between_ranks(whole, grid)


def _differs_between_ranks(mine: Tensor, grid: RankGrid) -> bool:
    most, least = mine.clone(), mine.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=grid.cpu_group)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=grid.cpu_group)
    return not torch.equal(most, least)


def check_checkpoint(folder: Path, work: Path, grid: RankGrid, dtype: Any, distributed: bool) -> None:
    """1 + 1 steps are 2 steps, and whether the optimizer is offloaded may change in between."""
    plain: dict[str, Any] = {"distributed": distributed}
    offloaded = {**plain, "cpu_offload": 0.5}
    for number, (before, after) in enumerate([(offloaded, offloaded), (plain, offloaded), (offloaded, plain)]):
        whole = build(folder, grid, dtype, **before)
        train(whole, 1)
        where = work / f"{dtype}-{number}"
        saved = save_checkpoint(whole, where, step=1, extra={}, keep_last=1)
        wanted = train(whole, 1)
        again = build(folder, grid, dtype, **after)
        load_checkpoint(again, saved)
        assert train(again, 1) == wanted, (before, after)
        last = weights(whole)
        assert all(torch.equal(t, last[n]) for n, t in weights(again).items()), (before, after)
        if "cpu_offload" in after:
            check_offloaded(again, 0.5, "after loading")


def main() -> None:
    work = Path(sys.argv[1])
    # several buckets even of a tiny model
    small = partial(optimizer_module.DistributedDataParallelConfig, bucket_size=20_000)
    optimizer_module.DistributedDataParallelConfig = small
    grid = init_grid(ParallelSection(data=2, device="cpu", collective_timeout_s=60), seed=1)
    for dtype, distributed in (("float32", False), ("bfloat16", True)):
        check_variants(work / "qwen3", grid, dtype, distributed)
        check_checkpoint(work / "qwen3", work, grid, dtype, distributed)
    check_gather(work / "qwen3", grid)
    close_grid()


if __name__ == "__main__":
    main()
