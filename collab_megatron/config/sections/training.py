"""The sections of a trainer: run, model, data, layout, optimizer, algorithm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from collab_megatron.config.sections.algorithms import (
    Aggregation,
    Baseline,
    ImportanceLevel,
    KLEstimator,
    PolicyLoss,
    Preset,
    Scale,
    check_pieces,
    check_tree_credit,
    expanded,
)
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

    dir: Path = Path("runs/default")  # folder for all files of the run
    # name of the run's files in tensorboard/, checkpoints/, conversations/, evaluations/, journal/, weights/ and logs/,
    # so that several runs can share one dir
    name: str = "run"
    seed: Seed = 1  # of the data order, the sampling and the LLM calls
    # true: resume from this run's newest complete checkpoint, even with a changed config; start at step 0 without one.
    # auto: the same, but refuse checkpoints of another config (the default of slurm/*.sbatch, for requeued jobs).
    # false: refuse if there is a checkpoint
    resume: Literal[True, False, "auto"] = False
    # a checkpoint of another run, of any layout (a step folder, or a folder of steps: the newest), whose weights this
    # run starts from. Optimizer, steps, schedule and data order start at zero. Tokenizer, architecture and the
    # reference of the KL term still come from model.path. Ignored by a resume
    init_from: Path | None = None
    # permissions of all new files and folders, which contain prompts, replies and addresses of LLM servers. "077": only
    # the owner; "027": the group can read; "007": the group can write; "022": everybody can read
    umask: Umask = "077"
    # a process that a signal (SIGSTOP) has stopped for this long counts as hung: engines and drivers are killed and
    # restarted; a trainer rank ends the run after a save. At most 60, because the trainer gives up a silent driver at
    # 120
    stopped_timeout_s: Annotated[float, Field(gt=0, le=60)] = 20.0

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        """A safe name for files and folders: no path separators, nothing special to a shell."""
        if not _RUN_NAME.fullmatch(value) or len(value.encode()) > LONGEST_NAME:
            raise ValueError(
                f"{value[:LONGEST_NAME]!r} cannot be a folder's name: use letters, digits and . _ + = @ - after a "
                f"letter or digit, {LONGEST_NAME} bytes at most"
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
        """Figures; the conversations are in `evaluations_dir`."""
        return self.dir / "evaluations" / f"{self.name}.jsonl"

    @property
    def evaluations_dir(self) -> Path:
        return self.dir / "evaluations" / self.name

    @property
    def engine_probe_file(self) -> Path:
        return self.dir / "engine_probe" / f"{self.name}.json"

    @property
    def weights_dir(self) -> Path:
        """Folder of the disk transport; a run empties it at the start."""
        return self.dir / "weights" / self.name

    @property
    def logs_dir(self) -> Path:
        return self.dir / "logs" / self.name

    def profile_dir(self, attempt: int) -> Path:
        """Traces of an attempt: next to its logs (launch/attempts.py)."""
        return self.logs_dir / f"attempt-{attempt}" / "profile"

    @property
    def lock_file(self) -> Path:
        """Exists while a process writes any of the above."""
        return self.dir / "locks" / f"{self.name}.lock"


class ModelSection(Section):
    """The model to train: a Hugging Face folder or hub name."""

    path: FolderOrHubName  # also a checkpoint of this project for evaluate.py
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and activations


class DataSection(Section):
    """Parquet files as written by tools/prepare_dataset.py: one path, or a list. Files are concatenated; a row that an
    earlier file contains is left out and counted."""

    train: Path | tuple[Path, ...]  # rows to train on
    validation: Path | tuple[Path, ...] | None = None  # held-out rows; None: no evaluation

    @field_validator("train", "validation")
    @classmethod
    def _files_named_once(cls, value: Path | tuple[Path, ...] | None) -> Path | tuple[Path, ...] | None:
        if value == ():
            raise ValueError("data.train and data.validation must not be empty lists: name a file")
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
        """The held-out files in order; empty without data.validation."""
        if self.validation is None:
            return ()
        return (self.validation,) if isinstance(self.validation, Path) else self.validation


class ParallelSection(Section):
    """How the model is divided among trainer ranks. World size = tensor * pipeline * context * data."""

    tensor: Positive = 1  # tensor-parallel ranks per replica
    pipeline: Positive = 1  # pipeline stages
    interleave: Positive = 1  # model chunks per pipeline stage; above 1: the interleaved schedule
    context: Positive = 1  # ranks that share each sequence; needs transformer-engine
    expert: Positive = 1  # ranks that share the experts of a mixture-of-experts model; divides tensor * context * data
    data: Positive = 1  # replicas
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if GPU and GPU packages are there
    # CPU threads of each rank. None: all cores; with
    # driver.max_staleness > 0 a share, because engines run at the same time
    threads: Positive | None = None
    # a tensor-parallel group may have ranks on several nodes: every layer then waits for the network
    tensor_across_nodes: bool = False
    sequence_parallel: bool = False  # divide norms and residuals over the tensor-parallel ranks too
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

    lr: float = Field(default=1e-6, gt=0)  # highest learning rate
    min_lr: float = Field(default=0.0, ge=0)  # learning rate at the end of the decay
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # decay of the learning rate
    warmup_steps: Count = 0  # steps in which the learning rate rises linearly
    weight_decay: float = Field(default=0.0, ge=0)  # decoupled, as in AdamW
    beta1: float = Field(default=0.9, ge=0, lt=1)  # decay of the gradient's running mean
    beta2: float = Field(default=0.95, ge=0, lt=1)  # decay of the squared gradient's running mean
    eps: float = Field(default=1e-8, gt=0)  # added to the denominator of the update
    clip_grad: float = Field(default=1.0, ge=0)  # largest gradient norm; 0 turns clipping off
    # megatron's DistributedOptimizer (optimizer state sharded over data ranks); None: on GPUs with several data ranks
    distributed: bool | None = None
    overlap: bool | None = None  # overlap communication with computation; None: on GPUs
    cpu_offload: Share = 0.0  # share of master weights and moments that are kept and updated on the host

    def shards_state(self, *, device: str, copies: int) -> bool:
        """Whether each of the `copies` ranks that hold the same weights has a part of their optimizer state only."""
        return device == "cuda" and copies > 1 if self.distributed is None else self.distributed

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr={self.min_lr:g} is above optimizer.lr={self.lr:g}: lower it")
        return self


class TrainSection(Section):
    """Length of training, micro-batches, checkpoints, evaluation."""

    steps: Positive = 100  # training steps; null: unset an inherited value, to use epochs
    # passes over the usable rows, in place of steps; the start prints the number of steps
    epochs: float | None = Field(default=None, gt=0)
    micro_batch_tokens: Positive = 8192  # tokens of one micro-batch on one data rank, padding included
    packing: bool = False  # concatenate sequences in one row (THD) instead of padding rows
    # RL and DPO: pack the replies to a prompt into one row after it, so that it is computed once. Not implemented on
    # GPUs and for parallel.context > 1: there the prompt is computed for every reply
    share_prompts: bool = True
    recompute: Literal["none", "selective", "full"] = "none"  # activations to compute again in the backward pass
    logits_chunk_mb: Positive = 512  # largest size of fp32 logits at a time; more tokens are computed in chunks
    save_interval: Count = 0  # steps between checkpoints; 0: only at the end, and every save_every_s
    # save after the first step that ends this long after the last checkpoint; 0: never
    save_every_s: float = Field(default=1800.0, ge=0)
    # time for an interrupted run (Ctrl-C, scancel, a time limit) to finish its step and save. Then its processes are
    # killed, and the newest checkpoint is the previous one
    save_grace_s: Seconds = 60.0
    keep_last: Positive = 2  # newest checkpoints to keep
    keep_every: Count = 0  # also keep checkpoints whose step is a multiple of this; 0: none
    # consecutive optimizer steps that may be skipped because their gradient is not finite; then the run stops
    max_skipped_steps: Positive = 3
    # starts of all trainer ranks again, from the newest checkpoint in the same job, after one of them was killed or
    # hung. The count starts over at each checkpoint that they write. With engine.urls of colocated engines none,
    # because their memory may be the trainer's
    max_restarts: Count = 3
    async_save: bool = False  # write checkpoints in the background
    # steps between evaluations on data.validation; 0: only before the first step and after the last. RL plays whole
    # conversations, SFT and DPO compute the loss
    eval_interval: Count = 0
    eval_at_start: bool = True  # evaluate before the first step too
    # SFT and DPO: save whenever the held-out loss is the lowest so far, and keep that checkpoint besides keep_last
    keep_best: bool = True

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if key != "steps" or value is not None}
        if "steps" in given and given.get("epochs") is not None:
            raise ValueError(
                f"train.epochs={given['epochs']} and train.steps={given['steps']} are both set: remove one of them "
                "(train.steps=null unsets an inherited value)"
            )
        return given

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps, whatever the clock says: at the interval and at the end."""
        return done == self.steps or (self.save_interval > 0 and done % self.save_interval == 0)

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation is due after `done` steps: at the interval and at the end."""
        return done == self.steps or (self.eval_interval > 0 and done % self.eval_interval == 0)


class AlgorithmSection(Section):
    """The RL algorithm on multiturn-aware rewards. A name stands for its pieces (docs/algorithms.md):
    `algorithm: gspo`, or `algorithm: {preset: gspo, clip_high: 0.001}`, where keys that are set win."""

    # GRPO and others, by name. The defaults below are those of grpo
    preset: Preset = "grpo"
    # what is subtracted from a reply's reward. group: the group's mean; leave_one_out: the mean of the other replies;
    # batch: the mean over the step's tokens
    baseline: Baseline = "group"
    # what the difference is divided by: the std of the group's rewards, the std over the step's tokens, or nothing
    scale: Scale = "group_std"
    # added to the group's std; a tiny value amplifies groups that differ in reply length only
    advantage_eps: float = Field(default=0.05, gt=0)
    # groups with a smaller std of rewards get advantage 0. Not used with baseline: batch
    min_group_std: float = Field(default=0.01, ge=0)
    # groups below min_group_std. keep: their tokens count in the mean over tokens and have the KL term only, so they
    # dilute the gradient of other groups and pull towards the reference. drop: they are not trained, and a step without
    # other groups makes no update. Groups that driver.refill_groups replaced are never trained
    zero_advantage: Literal["keep", "drop"] = "keep"
    # which policy turns are trained. reply: the n replies of a group, as in the paper. tree: also every later turn of
    # their futures, from the same LLM calls; its return is the mean reward of the conversations below it
    credit: Literal["reply", "tree"] = "reply"
    # credit: tree: what a later turn's return is compared with, always without the conversations through that turn.
    # siblings: an estimate of its context's value from the conversations through the same contexts, shrunk towards
    # those through the same reply and the group; group: the mean over the group's conversations
    tree_baseline: Literal["siblings", "group"] = "siblings"
    # DAPO's overlong shaping: the last share of rollout.max_new_tokens in which a longer reply, or with credit: tree a
    # longer policy turn, loses reward; 0: none
    overlong_share: Share = 0.0
    overlong_penalty: float = Field(default=1.0, gt=0)  # reward that a reply of rollout.max_new_tokens loses
    # ppo: clipped ratio of each token; gspo: clipped mean ratio of the reply; cispo: clipped ratio as a weight, which
    # keeps the gradient of clipped tokens
    policy_loss: PolicyLoss = "ppo"
    clip_low: float = Field(default=0.2, ge=0)  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = Field(default=0.2, ge=0)  # as clip_low
    # largest ratio in the loss of a token with a negative advantage (dual-clip PPO; verl's clip_ratio_c is 3)
    clip_dual: float | None = Field(default=None, gt=1)
    # token_mean: over the trained tokens of an optimizer step; sequence_mean: over each reply, then over replies;
    # constant: sum over tokens / (replies x rollout.max_new_tokens)
    aggregation: Aggregation = "token_mean"
    entropy_coef: float = Field(default=0.0, ge=0)  # weight of the entropy bonus; above 0 the output head is slower
    # weight of the KL to the reference model; 0: no reference model
    kl_coef: float = Field(default=0.001, ge=0)
    # with d = log-prob of policy - of reference. k1: d; k2: d**2 / 2; k3: exp(-d) + d - 1. In the loss, k1 has an
    # expected gradient of 0, and only k2 has that of the KL
    kl_estimator: KLEstimator = "k3"
    # loss: a term of the loss. reward: subtracted from the rewards, from which the trainer then makes the advantages;
    # takes one more forward pass
    kl_in: Literal["loss", "reward"] = "loss"
    # model: a second copy on the device; swap: the initial weights are kept on the host and swapped in
    reference: Literal["model", "swap"] = "model"
    # trainer/engine importance weight. token: exp(logp - rollout_logp) of each; sequence: their product over the reply;
    # none: 1
    importance: ImportanceLevel = "token"
    importance_beyond: Literal["truncate", "mask"] = "truncate"  # weights beyond their limits: cut there, or set to 0
    importance_cap: float = Field(default=2.0, gt=0)  # upper limit of the importance weight
    importance_floor: float = Field(default=0.0, ge=0)  # lower limit, with importance_beyond: mask
    mini_batches: Positive = 1  # optimizer steps per rollout batch

    @model_validator(mode="before")
    @classmethod
    def _pieces_of_preset(cls, values: Any) -> Any:
        return expanded(values)

    @model_validator(mode="after")
    def _meaning(self) -> Self:
        check_pieces(
            baseline=self.baseline,
            scale=self.scale,
            zero_advantage=self.zero_advantage,
            policy_loss=self.policy_loss,
            clip_dual=self.clip_dual,
            kl_coef=self.kl_coef,
            kl_in=self.kl_in,
            importance=self.importance,
            importance_beyond=self.importance_beyond,
            importance_cap=self.importance_cap,
            importance_floor=self.importance_floor,
        )
        if self.credit == "tree":
            check_tree_credit(self.baseline, self.kl_coef, self.kl_in)
        return self

    @property
    def reduces_over_replies(self) -> bool:
        """Whether the loss has sums over the tokens of each trained policy turn."""
        return self.policy_loss == "gspo" or self.importance == "sequence"

    @property
    def merges_turns(self) -> bool:
        """Whether the trained turns of a conversation are one sequence. Sums over turns need a sequence for each."""
        return self.credit == "tree" and not self.reduces_over_replies

    @property
    def kl_in_reward(self) -> bool:
        """Whether the trainer subtracts a KL from the rewards."""
        return self.kl_coef > 0 and self.kl_in == "reward"


class PreferenceSection(Section):
    """Online DPO in train_rl, in place of the policy gradient: the best reply of each group against its worst, by
    multiturn-aware reward. null: off. Of `algorithm` it uses min_group_std, overlong_share, overlong_penalty, reference
    and mini_batches."""

    # strength of the reference: the loss of a pair is -log sigmoid(beta * margin). A small beta lets the policy move
    # further away from it
    beta: float = Field(default=0.1, gt=0)
    min_gap: float = Field(default=0.0, ge=0)  # a group whose best and worst rewards differ by no more gives no pair


class DPOSection(Section):
    """DPO on pairs of replies."""

    beta: float = Field(default=0.1, gt=0)  # as online_dpo.beta
    # model: a second copy of model.path on the device; swap: its weights are kept on the host and swapped in
    reference: Literal["model", "swap"] = "model"
