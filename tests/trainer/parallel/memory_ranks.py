"""Run by test_memory_parallel.py: the memory of a real training step, next to the prediction of model/memory.py.

    memory_ranks.py WORK KIND TENSOR PIPELINE DATA EXPERT DTYPE,RECOMPUTE[,packed][,offload][,interleave] ...

WORK/KIND is a model folder large enough that padding and bookkeeping do not show. Every figure may be 10 % off. Bytes
are those of distinct storages: parameters, DDP's gradient buffers, the optimizer's state, and for activations whatever
autograd holds for the backward pass, at the moment when it is most. The sum is held against torch's allocator.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from collab_megatron.config.sections import OptimizerSection, ParallelSection, TrainSection
from collab_megatron.model.memory import trainer_memory
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.actor.offload import OffloadedAdamW
from collab_megatron.trainer.actor.optimizer import parts
from collab_megatron.trainer.actor.reference import SwappedReference, build_reference
from collab_megatron.trainer.batching.micro_batch import MicroBatch, TokenSample, split_by_tokens
from collab_megatron.trainer.loss.losses import LossSum, sft_loss

TOKENS = 520  # rows too long for local/kernels.py's attention over short ones, also when two share one
MICRO_BATCHES = 2
MOST_OFF = 0.1


class Held:
    """One tensor that autograd keeps; counted until it lets go."""

    def __init__(self, live: Live, tensor: Tensor) -> None:
        self.live, self.tensor = live, tensor
        live.change(tensor, 1)

    def __del__(self) -> None:
        self.live.change(self.tensor, -1)


class Live:
    """Bytes of the distinct storages that autograd holds, now and at most; `ignored` storages do not count."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.users: Counter[int] = Counter()
        self.now = self.most = 0

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer in self.ignored:
            return
        before = self.users[pointer]
        self.users[pointer] += by
        if not before or not self.users[pointer]:
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)


def num_bytes(tensors: Iterable[Tensor], apart_from: Iterable[Tensor] = ()) -> int:
    """Of the distinct storages."""
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def micro_batches(actor: Actor, packed: bool) -> list[MicroBatch]:
    # one row a micro-batch: the rotation's tables are made per column
    rows, length = (2, TOKENS // 2) if packed else (1, TOKENS)
    random = Random(actor.grid.dp_rank)  # so that experts get about as much each
    ids = [[random.randrange(actor.spec.vocab) for _ in range(length)] for _ in range(rows * MICRO_BATCHES)]
    samples = [TokenSample(row, [1.0] * length, {}) for row in ids]
    multiple = actor.grid.pad_multiple
    batches = split_by_tokens(samples, micro_batch_tokens=TOKENS, pad_id=0, pad_multiple=multiple, packed=packed)
    assert len(batches) == MICRO_BATCHES
    return batches


def loss_fn(logprobs: Tensor, batch: MicroBatch) -> LossSum:
    return sft_loss(logprobs, mask=batch.mask)


def held_in_step(actor: Actor, batches: list[MicroBatch]) -> int:
    """One training step; the most that autograd held."""
    live = Live(weights_of(actor))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Held(live, tensor), lambda held: held.tensor):
        actor.train_step(batches, loss_fn, TOKENS)
    assert live.now == 0, live.now
    return live.most


def allocated_in_step(actor: Actor, batches: list[MicroBatch]) -> int:
    """One more training step; the most that torch's allocator gave out on top of what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        actor.train_step(batches, loss_fn, TOKENS)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes))


def weights_of(actor: Actor) -> list[Tensor]:
    return [parameter for chunk in actor.chunks for parameter in chunk.parameters()]


def check(folder: Path, grid: RankGrid, dtype: Any, recompute: Any, extras: list[str]) -> None:
    offload = 0.5 if "offload" in extras else 0.0
    section = OptimizerSection(distributed=grid.dp_size > 1, cpu_offload=offload)
    train = TrainSection(micro_batch_tokens=TOKENS, recompute=recompute, packing="packed" in extras, logits_chunk_mb=64)
    actor = Actor.build(
        folder,
        dtype=dtype,
        grid=grid,
        optimizer=section,
        total_steps=9,
        recompute=recompute,
        logits_chunk_mb=train.logits_chunk_mb,
    )
    kind: Literal["swap", "model"] = "swap" if offload else "model"
    reference = build_reference(actor, kind, logits_chunk_mb=train.logits_chunk_mb)
    batches = micro_batches(actor, train.packing)
    activations, allocated = held_in_step(actor, batches), allocated_in_step(actor, batches)
    plan = trainer_memory(
        actor.spec,
        dtype=dtype,
        parallel=grid.parallel,
        optimizer=section,
        train=train,
        reference=kind,
        device="cpu",
        micro_batches=MICRO_BATCHES,
    )[grid.pp_rank]
    on_device, on_host = optimizer_bytes(actor)
    found = {
        "weights": num_bytes(weights_of(actor)),
        "gradients": num_bytes(b.grad_data for c in actor.wrapped for b in [*c.buffers, *c.expert_parallel_buffers]),
        "optimizer": on_device,
        "host_optimizer": on_host,
        "activations": activations,
        "reference": num_bytes(weights_of(reference)) if isinstance(reference, Actor) else 0,
        "host_reference": swapped_bytes(reference) if isinstance(reference, SwappedReference) else 0,
    }
    found["device"] = sum(found[name] for name in ("weights", "gradients", "optimizer", "reference")) + allocated
    wrong = []
    for name, measured in found.items():
        formula = getattr(plan, name)
        off = formula / measured - 1 if measured else float(formula > 0)
        where = " ".join([dtype, recompute, *extras, grid.place])
        line = f"{where}: {name} {formula:,} by formula, {measured:,} measured, {off:+.1%}"
        print(line, flush=True)
        if abs(off) > MOST_OFF:
            wrong.append(line)
    assert not wrong, "\n".join(wrong)


def optimizer_bytes(actor: Actor) -> tuple[int, int]:
    """(device, host): moments, and master weights that are not the weights themselves."""
    here: list[Tensor] = []
    host: list[Tensor] = []
    for part in parts(actor.optimizer):
        inner = part.optimizer
        for parameter in part.get_parameters():
            offloaded = isinstance(inner, OffloadedAdamW) and inner.is_on_host(parameter)
            moments = [t for name, t in inner.state[parameter].items() if name.startswith("exp_avg")]
            (host if offloaded else here).extend([parameter, *moments])
    weights = weights_of(actor)
    return num_bytes(here, apart_from=weights), num_bytes(host, apart_from=weights)


def swapped_bytes(reference: SwappedReference) -> int:
    return num_bytes([*reference._frozen, *reference._own])


def main() -> None:
    work, kind = Path(sys.argv[1]), sys.argv[2]
    tensor, pipeline, data, expert = map(int, sys.argv[3:7])
    cases = [case.split(",") for case in sys.argv[7:]]
    parallel = ParallelSection(
        tensor=tensor,
        pipeline=pipeline,
        interleave=2 if any("interleave" in case for case in cases) else 1,
        data=data,
        expert=expert,
        sequence_parallel=tensor > 1,
        device="cpu",
        collective_timeout_s=60,
    )
    grid = init_grid(parallel, seed=1)
    for dtype, recompute, *extras in cases:
        check(work / kind, grid, dtype, recompute, extras)
    close_grid()


if __name__ == "__main__":
    main()
