"""Passes of micro-batches through this rank's model chunks with megatron's schedules, under every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.batching.micro_batch import MicroBatch, idle_like, of_one_length, on_device
from collab_megatron.trainer.batching.partition import context_columns, from_context_parts
from collab_megatron.trainer.local.layers import Packing

# megatron's forward_step_func: (iterator, model) -> (output, function of the output that makes the loss)
ForwardStep = Callable[[Iterator[MicroBatch], Any], tuple[Tensor, Any]]


def forward(model: Any, batch: MicroBatch, grid: RankGrid) -> tuple[Tensor, MicroBatch]:
    """One forward pass; returns the chunk's output and the batch for the loss function.

    The output is [2, B, S] fp32 on the last stage (log-probability and entropy of each trained label, 0 elsewhere),
    else hidden states. The batch is on grid.device, with its entries at the positions that predict them; under context
    parallelism both are this rank's columns.
    """
    inputs, labelled = batch.ids, batch.by_predicting_position()
    if grid.cp_size > 1:
        columns = context_columns(inputs.shape[1], grid.cp_rank, grid.cp_size).to(inputs.device)
        inputs, labelled = inputs.index_select(1, columns), labelled.take_columns(columns)
    rows = labelled.trained_rows()  # before the copy to a GPU: the search would wait for all that is queued there
    inputs, rows = on_device(inputs, grid.device), on_device(rows, grid.device)
    labelled = labelled.to(grid.device)
    output = model(
        input_ids=inputs,
        position_ids=None,
        attention_mask=None,
        labels=labelled.ids,
        loss_mask=rows,
        packed_seq_params=Packing.of(batch.segments, grid.device) if batch.packed else None,
    )
    return output, labelled


def run_schedule(
    step: ForwardStep, chunks: Sequence[Any], micro_batches: Sequence[MicroBatch], grid: RankGrid, *, forward_only: bool
) -> list[Any]:
    """Run every micro-batch forward (and backward). Returns the loss functions' results in order, on the last stage.

    Idle micro-batches are added at the end if ranks or the schedule need equal numbers. The steps of a pipeline may get
    longer rows than those of `micro_batches`, with padding at the end.
    """
    batches = _with_idle(micro_batches, grid)
    if grid.pp_size > 1:
        batches = of_one_length(batches)
    iterators = [iter(batches) for _ in chunks]
    several = len(chunks) > 1
    with _shapes_sent_if_they_differ(chunks[0].config, batches):
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if several else iterators[0],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=batches[0].ids.shape[1],
            micro_batch_size=batches[0].ids.shape[0],
            forward_only=forward_only,
        )
    return results


@contextlib.contextmanager
def _shapes_sent_if_they_differ(config: TransformerConfig, batches: Sequence[MicroBatch]) -> Iterator[None]:
    """Inside, the stages of a pipeline send each other the shapes only if they cannot know them.

    megatron-core 0.16.1 reads the setting at every message: pipeline_parallel/p2p_communication.py, _communicate.
    """
    before = config.variable_seq_lengths
    config.variable_seq_lengths = before and len({batch.ids.shape for batch in batches}) > 1
    try:
        yield
    finally:
        config.variable_seq_lengths = before


def _with_idle(micro_batches: Sequence[MicroBatch], grid: RankGrid) -> list[MicroBatch]:
    count = len(micro_batches)
    if grid.ep_size > 1:  # the ranks of an expert group exchange tokens in every layer of every micro-batch
        most = torch.tensor([count])
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=grid.cpu_group)
        count = int(most)
    if grid.parallel.interleave > 1:  # the interleaved schedule has rounds of one micro-batch per stage
        count = -(-count // grid.pp_size) * grid.pp_size
    return [*micro_batches, *[idle_like(micro_batches[0], grid.pad_multiple)] * (count - len(micro_batches))]


def token_aligned(output: Tensor, length: int, grid: RankGrid) -> Tensor:
    """The last stage's [2, B, S] (this context rank's columns) -> whole rows, each entry at the token it belongs to.

    length: of the rows; what the schedule added is cut off.

    A first token gets the entry of the row's, or of another sample's, last position, which predicts nothing: 0.
    """
    if grid.cp_size > 1:
        parts = [torch.empty_like(output) for _ in range(grid.cp_size)]
        dist.all_gather(parts, output.contiguous(), group=grid.cp_group)
        output = from_context_parts(parts)
    return output.roll(1, dims=-1)[..., :length].cpu()


def from_last_stage(tensors: list[Tensor], shapes: Sequence[tuple[int, ...]], grid: RankGrid) -> list[Tensor]:
    """fp32 CPU tensors of the given shapes from the last stage to every stage of this replica."""
    if grid.pp_size == 1:
        return tensors
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.cat([t.flatten() for t in tensors]) if grid.is_last_stage else torch.empty(sum(sizes))
    group = grid.pp_cpu_group
    dist.broadcast(flat, src=dist.get_process_group_ranks(group)[-1], group=group)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
