"""The sections of a trainer: run, model, data, layout, optimizer, algorithm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from collab_megatron.config.sections.base import (
    Count,
    FolderOrHubName,
    Positive,
    Seconds,
    Section,
    Seed,
    Share,
    Umask,
)
from collab_megatron.errors import UserError

LONGEST_NAME = 100  # bytes of a run's name; file names have 255, and the longest that are made of it add some 60
_RUN_NAME = re.compile(r"\w[\w.+=@-]*")


class RunSection(Section):
    """Where a run writes, and from which random seed."""

    dir: Path = Path("runs/default")  # everything the run makes lies below
    # what tensorboard/, checkpoints/, conversations/, evaluations/, journal/, weights/ and logs/ call the run's own, so
    # that several runs share one dir
    name: str = "run"
    seed: Seed = 1
    # true: go on from this run's newest complete checkpoint, whatever has changed in the config, and start where
    # there is none; auto: the same, but another run's checkpoints are refused (the default of slurm/*.sbatch, for jobs
    # that are requeued); false: refuse where there is one
    resume: Literal[True, False, "auto"] = False
    # a checkpoint of another run, of any layout (a step folder, or the folder of several: its newest), whose weights
    # this run starts from in the place of model.path's. Optimizer, steps, schedule and data order begin at zero;
    # model.path still gives tokenizer and architecture, and the reference of the KL term. A resume does not look at it
    init_from: Path | None = None
    # whom the files and folders that are made are kept from: "077" from all but their owner; "027" lets the group read,
    # "007" lets it write, "022" lets everybody read. Prompts, replies and the addresses of LLM servers are among them
    umask: Umask = "077"
    # a process of the run that a signal has stopped (SIGSTOP) for so long is taken for hung: engines and drivers are
    # killed and started again, a trainer rank ends the run, saved. At most 60: the trainer gives a silent driver up at
    # 120
    stopped_timeout_s: Annotated[float, Field(gt=0, le=60)] = 20.0

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        """Folders and files are called so: nothing that leads elsewhere, or that a shell takes for something else."""
        if not _RUN_NAME.fullmatch(value) or len(value.encode()) > LONGEST_NAME:
            raise ValueError(
                f"{value[:LONGEST_NAME]!r} names no folder: use letters, digits and . _ + = @ - after a letter or "
                f"digit, {LONGEST_NAME} bytes at most"
            )
        return value

    @property
    def checkpoints_dir(self) -> Path:
        return self.dir / "checkpoints" / self.name

    @property
    def tensorboard_dir(self) -> Path:
        return self.dir / "tensorboard" / self.name

    @property
    def conversations_dir(self) -> Path:
        return self.dir / "conversations" / self.name

    @property
    def evaluations_file(self) -> Path:
        """Figures; what was said lies in `evaluations_dir`."""
        return self.dir / "evaluations" / f"{self.name}.jsonl"

    @property
    def evaluations_dir(self) -> Path:
        return self.dir / "evaluations" / self.name

    @property
    def engine_probe_file(self) -> Path:
        return self.dir / "engine_probe" / f"{self.name}.json"

    @property
    def weights_dir(self) -> Path:
        """Of the disk transport: a run removes what it finds there."""
        return self.dir / "weights" / self.name

    @property
    def logs_dir(self) -> Path:
        return self.dir / "logs" / self.name

    @property
    def lock_file(self) -> Path:
        """There while a process writes any of the above."""
        return self.dir / "locks" / f"{self.name}.lock"


class ModelSection(Section):
    """The model to train: a Hugging Face folder or hub name."""

    path: FolderOrHubName
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class DataSection(Section):
    """Parquet files as written by tools/prepare_dataset.py: one path, or a list of them. Rows of several files follow
    each other; a row that stands in an earlier file is left out and counted."""

    train: Path | tuple[Path, ...]
    validation: Path | tuple[Path, ...] | None = None

    @field_validator("train", "validation")
    @classmethod
    def _files_named_once(cls, value: Path | tuple[Path, ...] | None) -> Path | tuple[Path, ...] | None:
        if value == ():
            raise ValueError("data.train and data.validation name at least one file each, not an empty list")
        if isinstance(value, tuple) and len(set(value)) < len(value):
            twice = next(file for file in value if value.count(file) > 1)
            raise ValueError(f"data names the file {twice} twice: name each once")
        return value

    @property
    def train_files(self) -> tuple[Path, ...]:
        """The training files in order, one or several."""
        return (self.train,) if isinstance(self.train, Path) else self.train

    @property
    def validation_files(self) -> tuple[Path, ...]:
        """The held-out files in order; empty where none is named."""
        if self.validation is None:
            return ()
        return (self.validation,) if isinstance(self.validation, Path) else self.validation


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

    def require_transformer_engine(self, is_there: bool) -> None:
        """Raise UserError where the layout needs transformer-engine and this machine does not have it."""
        if self.context > 1 and not is_there:
            raise UserError(
                f"parallel.context={self.context} needs transformer-engine, because no other attention shares a "
                "sequence between ranks: install it on a machine with GPUs, or set parallel.context=1"
            )


class OptimizerSection(Section):
    """AdamW and its schedule; one unit of the schedule is one training step."""

    lr: float = Field(default=1e-6, gt=0)
    min_lr: float = Field(default=0.0, ge=0)  # where the decay ends
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)  # largest gradient norm; 0 turns clipping off
    distributed: bool = False  # megatron's DistributedOptimizer (optimizer state sharded over data ranks)
    overlap: bool | None = None  # reduce gradients and gather parameters during the computation; None: on GPUs
    cpu_offload: Share = 0.0  # share of master weights and moments that lives on the host, with the step taken there

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr:g} is above optimizer.lr={self.lr:g}: lower it")
        return self


class TrainSection(Section):
    """The length and rhythm of training."""

    steps: Positive = 100  # null: as if it were not there (for a config that extends one with steps)
    # passes over the usable rows, in the place of steps; the start counts the rows and reports the steps
    epochs: float | None = Field(default=None, gt=0)
    micro_batch_tokens: Positive = 8192  # tokens of one micro-batch on one data rank, padding included
    packing: bool = False  # sequences end to end in one row (THD) instead of padded rows
    # RL: the replies of a group stand in one packed row behind their prompt, which is computed once. On GPUs and with
    # parallel.context > 1, where it is not done yet, every reply is computed with a prompt of its own
    share_prompts: bool = True
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in the backward pass
    logits_chunk_mb: Positive = 512  # fp32 logits that may exist at a time; more tokens are worked on chunk by chunk
    save_interval: Count = 0  # steps between checkpoints; 0: only at the end, and by the clock
    save_every_s: float = Field(
        default=1800.0, ge=0
    )  # a checkpoint after the step that ends this long after the last one
    # how long an interrupted run (Ctrl-C, scancel, a time limit) may take to end its step and save; then its processes
    # are killed, and the newest checkpoint is the one before
    save_grace_s: Seconds = 60.0
    keep_last: Positive = 2  # complete checkpoints to keep
    keep_every: Count = 0  # besides, keep every checkpoint whose step is a multiple of this; 0: none
    max_skipped_steps: Positive = 3  # optimizer steps in a row whose gradient is not finite; then the run stops
    async_save: bool = False  # write checkpoints while training goes on
    # steps between evaluations on data.validation; 0: only before the first step and after the last. RL plays whole
    # conversations, SFT measures the loss on assistant tokens
    eval_interval: Count = 0
    eval_at_start: bool = True  # before the first step too
    # SFT: save whenever the held-out loss is the lowest so far, and keep that checkpoint apart from keep_last
    keep_best: bool = True

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if key != "steps" or value is not None}
        if "steps" in given and given.get("epochs") is not None:
            raise ValueError(
                f"train.epochs={given['epochs']} and train.steps={given['steps']} are both set: leave one out "
                "(train.steps=null takes an inherited one away)"
            )
        return given

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps, whatever the clock says: at the interval and at the end."""
        return done == self.steps or (self.save_interval > 0 and done % self.save_interval == 0)

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation is due after `done` steps: at the interval and at the end."""
        return done == self.steps or (self.eval_interval > 0 and done % self.eval_interval == 0)


class AlgorithmSection(Section):
    """GRPO on multiturn-aware rewards."""

    # added to the group's std; a tiny value inflates groups whose replies differ in length only
    advantage_eps: float = Field(default=0.05, gt=0)
    min_group_std: float = Field(default=0.01, ge=0)  # groups whose rewards spread less get advantage 0
    # what to do with them. keep: their tokens count in the mean over tokens and carry the KL term alone, so they thin
    # out the other groups' gradient and pull towards the reference; drop: they are not trained (a step without any
    # other group takes no optimizer step). Those that driver.refill_groups replaced are never trained
    zero_advantage: Literal["keep", "drop"] = "keep"
    clip_low: float = Field(default=0.2, ge=0)  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = Field(default=0.2, ge=0)
    # bounds the loss of a token whose advantage is negative at this ratio (dual-clip PPO; verl's clip_ratio_c is 3)
    clip_dual: float | None = Field(default=None, gt=1)
    kl_coef: float = Field(default=0.001, ge=0)  # weight of the low-variance KL to the reference; 0: no reference model
    # model: a second copy on the device; swap: the initial weights wait on the host and are swapped in
    reference: Literal["model", "swap"] = "model"
    importance_cap: float = Field(
        default=2.0, gt=0
    )  # trainer/engine importance weight exp(logp - rollout_logp) is cut here
    mini_batches: Positive = 1  # optimizer steps per rollout batch
