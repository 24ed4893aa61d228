"""The sections of a trainer: run, model, data, layout, optimizer, algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from collab_megatron.config.sections.base import Count, Positive, Seconds, Section, Share


class RunSection(Section):
    """Where a run writes, and from which random seed."""

    dir: Path = Path("runs/default")  # everything the run makes lies below
    name: str = "run"  # sub-folder of tensorboard/ and checkpoints/, so that several runs share one dir
    seed: int = 1
    resume: bool = False  # go on from the newest complete checkpoint of this run

    @property
    def checkpoints_dir(self) -> Path:
        return self.dir / "checkpoints" / self.name

    @property
    def tensorboard_dir(self) -> Path:
        return self.dir / "tensorboard" / self.name

    @property
    def logs_dir(self) -> Path:
        return self.dir / "logs" / self.name


class ModelSection(Section):
    """The model to train: a Hugging Face folder or hub name."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class DataSection(Section):
    """Parquet files as written by tools/prepare_dataset.py."""

    train: Path
    validation: Path | None = None


class ParallelSection(Section):
    """How many ranks share the model. World size = tensor * pipeline * context * data."""

    tensor: Positive = 1  # tensor-parallel ranks per replica
    pipeline: Positive = 1  # pipeline stages
    interleave: Positive = 1  # model chunks per pipeline stage; above 1: the interleaved schedule
    context: Positive = 1  # ranks that share each sequence; needs transformer-engine
    expert: Positive = 1  # ranks that share the experts of a mixture-of-experts model; divides tensor * context * data
    data: Positive = 1  # replicas
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # CPU threads of each rank. None: all cores while engines wait; shared with them where driver.max_staleness > 0
    threads: Positive | None = None
    sequence_parallel: bool = False  # split norms and residuals over the tensor-parallel ranks too
    collective_timeout_s: Seconds = 300.0  # deadline of every collective between trainer ranks

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


class OptimizerSection(Section):
    """AdamW and its schedule; one unit of the schedule is one training step."""

    lr: float = Field(default=1e-6, gt=0)
    min_lr: float = Field(default=0.0, ge=0)  # where the decay ends
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)  # largest gradient norm; 0 turns clipping off
    distributed: bool = False  # megatron's DistributedOptimizer (optimizer state sharded over data ranks)
    overlap: bool | None = None  # reduce gradients and gather parameters beside the computation; None: on GPUs
    cpu_offload: Share = 0.0  # share of master weights and moments that lives on the host, with the step taken there


class TrainSection(Section):
    """The length and rhythm of training."""

    steps: Positive = 100
    micro_batch_tokens: Positive = 8192  # tokens of one micro-batch on one data rank, padding included
    packing: bool = False  # sequences end to end in one row (THD) instead of padded rows
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in the backward pass
    logits_chunk_mb: Positive = 512  # fp32 logits that may exist at a time; more tokens are worked on chunk by chunk
    save_interval: Count = 0  # steps between checkpoints; 0: only at the end
    keep_last: Positive = 2  # complete checkpoints to keep
    keep_every: Count = 0  # besides, keep every checkpoint whose step is a multiple of this; 0: none
    async_save: bool = False  # write checkpoints beside the training
    eval_interval: Count = 0  # RL: steps between held-out evaluations; 0: only before the first and after the last
    eval_at_start: bool = True


class AlgorithmSection(Section):
    """GRPO on multiturn-aware rewards."""

    # added to the group's std; a tiny value inflates groups whose replies differ in length only
    advantage_eps: float = Field(default=0.05, gt=0)
    min_group_std: float = Field(default=0.01, ge=0)  # groups whose rewards spread less get advantage 0
    clip_low: float = Field(default=0.2, ge=0)  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = Field(default=0.2, ge=0)
    kl_coef: float = Field(default=0.001, ge=0)  # weight of the low-variance KL to the reference; 0: no reference model
    # model: a second copy on the device; swap: the initial weights wait on the host and are swapped in
    reference: Literal["model", "swap"] = "model"
    importance_cap: float = Field(
        default=2.0, gt=0
    )  # trainer/engine importance weight exp(logp - rollout_logp) is cut here
    mini_batches: Positive = 1  # optimizer steps per rollout batch
