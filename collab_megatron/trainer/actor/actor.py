"""The policy (or the frozen reference) on this rank: log-probs of micro-batches, and one optimizer step over them.

    actor = Actor.build(path, dtype="bfloat16", grid=grid, optimizer=config.optimizer, total_steps=config.train.steps)
    old_logprobs, _ = actor.logprobs(micro_batches)
    result = actor.train_step(micro_batches, loss_fn, normalizer=trained_tokens_of_all_ranks)

The loss of a step is sum / normalizer. Neither the number of micro-batches nor the number of data ranks scales it, so a
batch has the same gradient however it is divided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from collab_megatron.config.sections import OptimizerSection
from collab_megatron.errors import WeightsNotFinite
from collab_megatron.model.folder import read_hf_config, resolve_model_folder
from collab_megatron.model.layout import check_layout
from collab_megatron.model.spec import ModelSpec, model_spec
from collab_megatron.trainer.actor.agreement import fail_together, gather, phase
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.actor.optimizer import build_optimizer, parts, step_if_finite, wrap_for_training
from collab_megatron.trainer.actor.policy_model import PolicyModel, Recompute, build_model
from collab_megatron.trainer.actor.schedule import forward, from_last_stage, run_schedule, token_aligned
from collab_megatron.trainer.batching.micro_batch import MicroBatch
from collab_megatron.trainer.convert.buckets import BucketStream, TensorInfo, bucket_plan, is_cut, tensor_plan
from collab_megatron.trainer.convert.exporter import hf_tensors
from collab_megatron.trainer.convert.finite import not_finite
from collab_megatron.trainer.convert.hf_folder import write_hf_folder
from collab_megatron.trainer.convert.loader import load_hf_weights
from collab_megatron.trainer.loss.losses import LossSum

LossFn = Callable[[Tensor, MicroBatch], LossSum]
StepMetrics = tuple[dict[str, Tensor], dict[str, Tensor]]  # of a micro-batch: sums, largest values


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; the same on every rank."""

    grad_norm: float  # before clipping; not finite if the step was skipped
    lr: float  # of this step
    metrics: dict[str, float]  # sums over all trained tokens of all ranks / normalizer; always "loss" and "entropy"
    skipped: bool  # the gradient was not finite: weights, optimizer and schedule are unchanged
    largest: dict[str, float] = field(default_factory=dict)  # over all trained tokens of all ranks, as in LossSum


@dataclass
class Actor:
    """One model on this rank of the grid. Every method is collective over the ranks that its docstring names."""

    grid: RankGrid
    spec: ModelSpec
    dtype: torch.dtype
    source_folder: Path  # of config, tokenizer and initial weights
    chunks: list[PolicyModel]  # unwrapped; several if the pipeline is interleaved
    section: OptimizerSection | None = None  # None: frozen
    wrapped: list[Any] = field(default_factory=list)  # the chunks inside megatron's DDP
    optimizer: MegatronOptimizer | None = None
    scheduler: OptimizerParamScheduler | None = None
    _weights_sharded: bool = False  # after a step of the overlapping distributed optimizer, until gather_weights

    @classmethod
    def build(
        cls,
        model_path: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"],
        grid: RankGrid,
        optimizer: OptimizerSection | None,
        total_steps: int = 0,
        load_weights: bool = True,
        recompute: Recompute = "none",
        logits_chunk_mb: int = 512,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> Actor:
        """Load a model folder onto the grid.

        optimizer: None for a frozen reference, which has no gradients. temperature: of the sampling; log-probs,
        entropies and losses are of the distribution at it. entropy_gradient: give loss functions the entropy as
        values["entropy"], with its gradient. load_weights: False leaves the weights undefined, if a
        checkpoint is loaded next. Raises UserError if the folder is not a supported model or the layout does not fit.
        """
        folder = resolve_model_folder(model_path)
        hf_config = read_hf_config(folder)
        check_layout(hf_config, grid.parallel)
        spec = model_spec(hf_config)
        torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        chunks = build_model(spec, torch_dtype, grid, recompute=recompute, logits_chunk_bytes=logits_chunk_mb * 2**20)
        for chunk in chunks:
            chunk.temperature, chunk.entropy_gradient = temperature, entropy_gradient
        if load_weights:
            load_hf_weights(chunks, spec, folder, grid)
        actor = cls(grid, spec, torch_dtype, folder, chunks, optimizer)
        if optimizer is None:
            for chunk in chunks:
                chunk.requires_grad_(False).eval()
            return actor
        actor.wrapped = wrap_for_training(chunks, optimizer, grid)
        actor.optimizer, actor.scheduler = build_optimizer(actor.wrapped, optimizer, torch_dtype, total_steps)
        return actor

    @property
    def temperature(self) -> float:
        """Divisor of the logits."""
        return self.chunks[0].temperature

    @contextlib.contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Log-probs inside the block are of the distribution at `temperature`."""
        before = self.temperature
        for chunk in self.chunks:
            chunk.temperature = temperature
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.temperature = before

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        assert self.optimizer is not None, "a frozen actor has no learning rate"
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def num_params(self) -> int:
        """Parameters of the whole model, without padding."""
        return sum(torch.Size(info.shape).numel() for info in self.tensor_plan())

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]:
        """Per micro-batch [B, S] fp32 on the CPU: log-probability of each token, and entropy of its distribution.

        Both are 0 outside the mask, where the head computes nothing. Collective over the ranks that share the model,
        which must pass the same micro-batches; with expert parallelism over all ranks.
        """
        self.gather_weights()
        found: list[Tensor] = []

        def step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            output, _ = forward(model, next(batches), self.grid)

            def keep(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                found.append(output)
                return _zero(output), _zero(output).int(), {}

            return output, keep

        with phase(self.grid, "log-probs"):
            run_schedule(step, self.chunks, micro_batches, self.grid, forward_only=True)
            shapes = [(2, *batch.ids.shape) for batch in micro_batches]
            aligned = [token_aligned(out, shape[-1], self.grid) for out, shape in zip(found, shapes, strict=False)]
            statistics = from_last_stage(aligned, shapes, self.grid)
        return [logprobs for logprobs, _ in statistics], [entropy for _, entropy in statistics]

    def train_step(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, normalizer: float) -> StepResult:
        """Gradient of (sum of loss_fn over all micro-batches of all data ranks) / normalizer, clipped, then AdamW.

        loss_fn: takes log-probs [B, S] and a micro-batch of the same shape on grid.device, in which every entry belongs
        to the token whose log-probability is there (columns are shifted by one, and under context parallelism are this
        rank's part); it may only form sums under the mask. normalizer: trained tokens of the global batch. Collective
        over all ranks: each needs at least one micro-batch and the same metric names; ranks of one replica need the
        same micro-batches. A step whose gradient is not finite is skipped. Raises WeightsNotFinite if the step left
        weights that are NaN or infinite.
        """
        if self.optimizer is None or self.scheduler is None or self.section is None:
            raise RuntimeError("train_step on a frozen actor")
        if not micro_batches or normalizer <= 0:
            raise ValueError(
                f"a step needs micro-batches and trained tokens, not {len(micro_batches)} and {normalizer}"
            )
        lr = self.lr
        with phase(self.grid, "the training step"):
            sums = self._gradients(micro_batches, loss_fn, normalizer)
            grad_norm, stepped = step_if_finite(self.optimizer, self.section.clip_grad)
            self._weights_sharded = stepped and self.wrapped[0].ddp_config.overlap_param_gather
            metrics, largest = self._reduce(sums, normalizer)
        if stepped:
            if (name := self.not_finite()) is not None:
                raise WeightsNotFinite(
                    f"an optimizer step with lr {lr:.3g} and gradient norm {grad_norm:.3g} left weights that are NaN "
                    f"or infinite ({name}); they are neither saved nor sent to an engine: lower optimizer.lr and "
                    "continue from the newest checkpoint with run.resume=true"
                )
            self.scheduler.step(increment=1)
        return StepResult(grad_norm, lr, metrics, skipped=not stepped, largest=largest)

    @torch.no_grad()
    def not_finite(self) -> str | None:
        """Rank and name of a weight that is NaN or infinite, the same on every rank; None if all are finite.

        Scans the optimizer's weights: of those that it shards over the data ranks, each rank's own shard. Collective.
        """
        held = (
            [p for part in parts(self.optimizer) for p in part.get_parameters()] if self.optimizer else self._weights()
        )
        with phase(self.grid, "the check of the weights"):
            found = torch.tensor(bool(not_finite(held)))
            if self.grid.world_size > 1:
                dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.grid.cpu_group)
            if not found:
                return None
            self.gather_weights()
            names = [name for chunk in self.chunks for name, _ in chunk.named_parameters()]
            mine = next((names[place] for place in not_finite(self._weights())), None)
            found_on = [f"rank {rank}: {name}" for rank, name in enumerate(gather(self.grid, mine)) if name is not None]
        return found_on[0] if found_on else "in the optimizer's copy"

    def _weights(self) -> list[Tensor]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def _gradients(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, normalizer: float) -> list[StepMetrics]:
        """Fill the gradient buffers, summed over all ranks; returns the last stage's metrics per micro-batch."""
        assert self.optimizer is not None
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        step = partial(self._loss_step, loss_fn, normalizer)
        return run_schedule(step, self.wrapped, micro_batches, self.grid, forward_only=False)

    def _loss_step(
        self, loss_fn: LossFn, normalizer: float, batches: Iterator[MicroBatch], model: Any
    ) -> tuple[Tensor, Any]:
        """Megatron's forward_step_func: returns the output and the function that makes the loss of it."""
        output, batch = forward(model, next(batches), self.grid)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, StepMetrics]:
            logprobs, entropy = output
            seen = (
                replace(batch, values={**batch.values, "entropy": entropy})
                if self.chunks[0].entropy_gradient
                else batch
            )
            result = loss_fn(logprobs, seen)
            metrics = {
                **result.metrics,
                "loss": result.loss.detach(),
                "entropy": (entropy.detach() * batch.mask).sum(),
            }
            # three values with calculate_per_token_loss: upstream neither scales nor averages the first
            return result.loss / normalizer, _zero(output).int(), (metrics, result.largest)

        return output, loss

    def _reduce(self, measured: list[StepMetrics], normalizer: float) -> tuple[dict[str, float], dict[str, float]]:
        """The last stage's metrics over all micro-batches and data ranks, on every rank: sums / normalizer, largest."""
        reduced: list[tuple[dict[str, float], dict[str, float]]] = [({}, {})]
        if self.grid.is_last_stage:
            sums = _stacked([sums for sums, _ in measured]).sum(dim=0)
            largest = _stacked([largest for _, largest in measured]).amax(dim=0)
            if self.grid.dp_size * self.grid.cp_size > 1:
                dist.all_reduce(sums, group=self.grid.dp_cp_group)
                if largest.numel():
                    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.grid.dp_cp_group)
            sum_names, largest_names = sorted(measured[0][0]), sorted(measured[0][1])
            means = (sums / normalizer).tolist()
            reduced = [
                (dict(zip(sum_names, means, strict=True)), dict(zip(largest_names, largest.tolist(), strict=True)))
            ]
        if self.grid.pp_size == 1:
            return reduced[0]
        group = self.grid.pp_cpu_group
        dist.broadcast_object_list(reduced, src=dist.get_process_group_ranks(group)[-1], group=group)
        return reduced[0]

    def gather_weights(self) -> None:
        """All-gather the weights of the unwrapped chunks after a step, which the overlapping distributed optimizer
        leaves to the next forward pass of the wrapped ones; else do nothing. Collective over the data ranks.
        """
        if self._weights_sharded:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)
            self._weights_sharded = False

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as whole Hugging Face tensors, one at a time; every rank must exhaust it (convert/exporter.py).

        Rank 0 gets all of them, other ranks those of their own pipeline stage.
        """
        self.gather_weights()
        return hf_tensors(self.chunks, self.spec, self.grid)

    def bucket_stream(self, bucket_bytes: int) -> BucketStream:
        """The weights as flat buckets, each on the ranks of its pipeline stage (convert/buckets.py)."""
        grid = self.grid
        plan = bucket_plan(
            self.spec,
            self.dtype,
            pipeline=grid.pp_size,
            interleave=grid.parallel.interleave,
            bucket_bytes=bucket_bytes,
            cut=is_cut(self.spec, grid),
        )
        return BucketStream(self.chunks, self.spec, grid, plan)

    def tensor_plan(self) -> list[TensorInfo]:
        """The tensors of hf_tensors, in order."""
        return tensor_plan(self.spec, self.dtype)

    def save_hf(
        self, output: Path, *, max_shard_size: str | int = "5GB", metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a Hugging Face folder. Collective over all ranks: rank 0 writes, all raise if it fails."""
        stream = self.hf_tensors()
        with fail_together(self.grid, f"saving the model to {output}", output.parent):
            try:
                if self.grid.is_main:
                    write_hf_folder(
                        stream, self.source_folder, output, max_shard_size=max_shard_size, metadata=metadata
                    )
            finally:
                for _ in stream:  # the other ranks take part in every gather, and so does rank 0 after a failure
                    continue


def _stacked(parts: list[dict[str, Tensor]]) -> Tensor:
    """[number of parts, number of names], names sorted."""
    if not parts[0]:
        return torch.zeros(len(parts), 0)
    return torch.stack([torch.stack([part[name].float() for name in sorted(part)]) for part in parts])


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)
