"""Megatron's DDP, optimizer and learning-rate schedule for one model, and a step that skips infinite gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from collab_megatron.config.sections import OptimizerSection
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.actor.offload import OffloadedAdamW
from collab_megatron.trainer.actor.policy_model import PolicyModel
from collab_megatron.trainer.local.cpu_support import patch_torch_adamw

logger = logging.getLogger(__name__)


def overlaps(section: OptimizerSection, grid: RankGrid) -> bool:
    """Whether gradients are reduced (and, with the distributed optimizer, weights gathered) during computation."""
    return grid.backend.overlap if section.overlap is None else section.overlap


def shards_state(section: OptimizerSection, grid: RankGrid) -> bool:
    """Whether the optimizer state is sharded over the ranks that hold the same weights."""
    return section.shards_state(device=grid.backend.name, copies=grid.dp_size * grid.cp_size)


def wrap_for_training(
    chunks: Sequence[PolicyModel], section: OptimizerSection, grid: RankGrid
) -> list[DistributedDataParallel]:
    """Each chunk inside megatron's DDP: contiguous fp32 gradient buffers, summed (never averaged) over data ranks."""
    config = chunks[0].config
    overlap, sharded = overlaps(section, grid), shards_state(section, grid)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=sharded,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and sharded,
        check_for_nan_in_grad=False,  # step_if_finite does; a rank that raises would leave the others waiting
    )
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=Float16Module(config, chunk) if config.bf16 else chunk,
            disable_bucketing=number > 0,  # as upstream does for the later chunks of an interleaved stage
        )
        for number, chunk in enumerate(chunks)
    ]
    if overlap:
        no_syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
    config.finalize_model_grads_func = _finalize
    return wrapped


def _finalize(model: list[Any], _num_tokens: Any = None, **kwargs: Any) -> None:
    """Upstream's reduction without its scaling: the loss is already divided by the global token count."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    wrapped: list[DistributedDataParallel], section: OptimizerSection, dtype: torch.dtype, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW (no decay on biases and norms) and its schedule, whose bounds the config has checked.

    The first warm-up step has lr / warmup_steps: at 0 it would train nothing.
    """
    patch_torch_adamw()
    sharded = wrapped[0].ddp_config.use_distributed_optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=sharded,
        overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, wrapped)
    logger.info(
        "optimizer: %s, state %s, lr %g %s",
        type(parts(optimizer)[0].optimizer).__name__,
        "sharded over the data ranks" if sharded else "whole on every data rank",
        section.lr,
        section.schedule,
    )
    if section.cpu_offload:
        _offload(optimizer, section.cpu_offload)
    for part in parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False  # one kernel per parameter instead of ten
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=section.lr / section.warmup_steps if section.warmup_steps else 0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=max(total_steps, section.warmup_steps + 1),
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resume uses the config's schedule and restores only its position
    )
    return optimizer, scheduler


def _offload(optimizer: MegatronOptimizer, share: float) -> None:
    """Replace megatron's optimizer by AdamW with a share of it on the host."""
    for part in parts(optimizer):
        if part.optimizer is None:  # a rank without trainable parameters of this kind
            continue
        groups = getattr(part, "fp32_from_float16_groups", None) or getattr(part, "shard_fp32_from_float16_groups", [])
        masters = [master for group in groups for master in group]
        replaced, part.optimizer = part.optimizer, OffloadedAdamW(part.optimizer.param_groups, masters, share)
        logger.info(
            "optimizer: torch's AdamW instead of %s, %d of %d weights updated on the host",
            type(replaced).__name__,
            part.optimizer.host_numel,
            sum(p.numel() for p in part.get_parameters()),
        )


def parts(optimizer: Any) -> list[Any]:
    """The optimizers that megatron chained (one, for a dense model)."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def step_if_finite(optimizer: MegatronOptimizer, clip_grad: float) -> tuple[float, bool]:
    """Clip and step unless the gradient norm is not finite. Returns (norm before clipping, stepped).

    megatron's own step() would write NaN into every weight. The norm is reduced over all ranks that share the model, so
    they decide alike.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, False
    if 0.0 < clip_grad < norm:
        for part in parts(optimizer):
            _scale(part, clip_grad / (norm + 1e-6))
    optimizer.step_with_ready_grads()
    return norm, True


def _scale(part: Any, factor: float) -> None:
    """Scale in place: without a fused kernel, upstream's clipping writes a second copy of every gradient."""
    gradients = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
    if gradients and gradients[0].is_cuda:
        torch._foreach_mul_(gradients, factor)
        return
    for gradient in gradients:
        gradient.mul_(factor)


def set_learning_rates(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """Call it after loading a checkpoint: the config's lr limits replace those of the loaded parameter groups."""
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = scheduler.max_lr, scheduler.min_lr
    scheduler.step(0)
