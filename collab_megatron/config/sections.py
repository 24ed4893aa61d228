"""The sections of a configuration: frozen, typed, every field with its meaning and unit.

A config file holds only what differs from the defaults here. Entry points combine the sections (entry.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Unknown keys are refused (load.py names the nearest known one); values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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


class ParallelSection(Section):
    """How many ranks share the model. World size = tensor * pipeline * context * data."""

    tensor: Positive = 1  # tensor-parallel ranks per replica
    pipeline: Positive = 1  # pipeline stages
    interleave: Positive = 1  # model chunks per pipeline stage; above 1: the interleaved schedule
    context: Positive = 1  # ranks that share each sequence; needs transformer-engine
    expert: Positive = 1  # ranks that share the experts of a mixture-of-experts model; divides tensor * context * data
    data: Positive = 1  # replicas
    device: Literal["auto", "cpu", "cuda"] = "auto"
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


class RolloutSection(Section):
    """The shape of the conversation trees."""

    prompts_per_step: Positive = 16
    num_replies: Annotated[int, Field(ge=2)] = 8  # n, the GRPO group
    num_repeat_rollouts: Count = 3  # K futures per reply; 0 scores the reply as it stands
    max_user_turns: Count = 2  # user turns inside a future
    max_assistant_turns: Positive = 3  # policy turns in all; the trained reply is the first
    max_new_tokens: Positive = 2048  # per policy turn
    max_prompt_tokens: Positive = 8192  # longer prompts are left out and counted
    temperature: float = Field(default=1.0, ge=1.0, le=1.0)  # the trainer's log-probs are of the unscaled distribution
    # what to do where growing a chat by token ids differs from rendering it whole (a template that removes the thinking
    # of earlier turns, or white space). refuse: say so and stop; as_sampled: keep growing: the policy sees its turns
    # as it sampled them; rendered: the context of every turn after the trained reply is rendered anew by the template
    inexact_template: Literal["refuse", "as_sampled", "rendered"] = "refuse"
    min_replies: Annotated[int, Field(ge=2)] = 2  # a group with fewer scored replies is dropped
    step_timeout_s: Seconds = 1800.0  # deadline of one step's rollouts


class RewardSection(Section):
    """R* = sum over metrics of clamp(weight * score, -1, 1). token_amount counts assistant tokens in thousands."""

    metric_weights: dict[str, float] = {"accuracy": 1.0, "interactivity": 1.0, "token_amount": -0.1}
    accuracy_verifier: Literal["exact", "judge"] = "judge"
    # replaces the shipped prompt of accuracy's judge; simulators.judge.prompt_file replaces that of interactivity
    accuracy_prompt_file: Path | None = None
    metric_modules: tuple[str, ...] = ()  # Python modules that register metrics of your own (rewards/registry.py)


class DeploymentSection(Section):
    """Another way to the same model: a second server, account or provider. LiteLLM's Router spreads calls over all."""

    model: str  # in LiteLLM's terms
    api_base: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    input_usd_per_mtoken: float | None = Field(default=None, ge=0)
    output_usd_per_mtoken: float | None = Field(default=None, ge=0)


class LLMSection(Section):
    """One role behind an LLM API, in LiteLLM's terms."""

    model: str  # e.g. gpt-4o-mini, anthropic/claude-..., openai/NAME for any OpenAI-compatible server
    api_base: str | None = None  # URL of a compatible server; None: the provider's own
    api_key_env: str | None = "OPENAI_API_KEY"  # NAME of the environment variable that holds the key; None: no key
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: Positive = 1024
    timeout_s: Seconds = 60.0  # deadline of one attempt
    deadline_s: Seconds = 240.0  # deadline of one call, its retries included
    max_attempts: Positive = 5
    max_concurrency: Positive = 64  # calls in flight, over all deployments; fewer while the provider pushes back
    requests_per_minute: Positive | None = None  # of the first deployment, the one that stands here
    tokens_per_minute: Positive | None = None  # prompt and completion tokens together
    deployments: tuple[DeploymentSection, ...] = ()  # further ones, of equal standing: fail-over, more limits
    cooldown_s: Seconds = 20.0  # a deployment that failed is left alone for so long, or for what it asked for
    json_mode: bool = True  # ask the provider for a JSON object where the prompt wants one
    json_schema: bool = False  # ask for the very fields too, where the model can
    prompt_file: Path | None = None  # replaces the shipped prompt template
    input_usd_per_mtoken: float | None = Field(default=None, ge=0)  # price; None: LiteLLM's table
    output_usd_per_mtoken: float | None = Field(default=None, ge=0)


class SimulatorSection(LLMSection):
    """A simulated user. A mixture of several keeps the policy from learning one simulator's habits."""

    weight: float = Field(default=1.0, gt=0)  # share of the conversations, relative to the others' weights


class UserSection(SimulatorSection):
    """The simulated users; each conversation keeps the one that it began with."""

    mixture: tuple[SimulatorSection, ...] = ()  # others beside the one that stands here


class HealthSection(Section):
    """How many of a simulator's replies may be odd (share of a step's replies), by name of the check: see
    simulators/health.py. Nothing happens before `min_replies` replies of a step."""

    warn: dict[str, Share] = {}  # said on the terminal; the shipped limits hold for checks that are not named
    stop: dict[str, Share] = {}  # saves a checkpoint and stops the run; none by default
    min_replies: Positive = 50


class SimulatorsSection(Section):
    """The LLMs around the policy."""

    user: UserSection
    judge: LLMSection | None = None  # needed by interactivity and by accuracy_verifier: judge
    assistant: LLMSection | None = None  # only tools/build_dataset.py: who proposes the candidate replies
    health: HealthSection = HealthSection()


class BudgetSection(Section):
    """What the LLM APIs may cost over the whole run, resumes included. At a soft cap the run says so; at a hard cap it
    finishes the conversations under way, saves a checkpoint and ends with exit code 3."""

    soft_usd: float | None = Field(default=None, gt=0)
    hard_usd: float | None = Field(default=None, gt=0)
    soft_calls: Positive | None = None
    hard_calls: Positive | None = None


class JournalSection(Section):
    """Every policy turn and every paid reply, on disk before it is used (SQLite)."""

    # auto: what the journal has is not asked for again; only: a miss stops the run; off: all is asked anew
    replay: Literal["auto", "only", "off"] = "auto"
    path: Path | None = None  # on a local disk; None: RUN_DIR/journal/NAME.sqlite
    keep_all: bool = False  # false: what a checkpoint has made obsolete is removed


class DriverSection(Section):
    """How conversation trees are grown, and how far ahead of the trainer."""

    shards: Positive = 1  # processes; the prompts of a step are dealt out to them
    max_staleness: Count = 0  # s: up to s + 1 batches are under way; 0: strictly on-policy
    # with max_staleness: trees under way beyond max_staleness batches, so that a step need not wait for its slowest;
    # what is unfinished goes on in the next step. 0: a whole batch
    oversample_prompts: Count = 0
    order: Literal["completion", "prompt"] = "completion"  # which trees make a batch: the first that end, or by prompt
    future_timeout_s: Seconds = 600.0  # deadline of one future, waiting for free slots included
    group_timeout_s: Seconds = 900.0  # at this age a tree is taken with the futures that are there
    min_futures: Positive = 1  # a reply with fewer scored futures leaves its group
    refill_groups: Count = 0  # trees per step that may be grown in place of dropped ones and of those without spread
    max_restarts: Count = 3  # of a driver process that died; it goes on from the journal


class EngineSection(Section):
    """The SGLang servers: started by us, or given as URLs."""

    count: Positive = 1  # servers to start, each with its own copy of the model
    urls: tuple[str, ...] = ()  # SGLang servers that run already; empty: start `count` of them
    placement: Literal["disaggregated", "colocated"] = "disaggregated"  # on GPUs of their own, or on the trainer's
    python: str | None = None  # interpreter of the engines' own environment; None: ours
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # of the first server, the others follow; 0: free ones
    tensor: Positive = 1  # tensor-parallel ranks of each server
    max_total_tokens: Positive | None = None  # KV-cache tokens; None: SGLang decides
    max_running_requests: Positive | None = None
    mem_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    context_length: Positive | None = None
    extra_args: tuple[str, ...] = ()
    startup_timeout_s: Seconds = 300.0
    request_timeout_s: Seconds = 600.0  # deadline of one generate call
    health_timeout_s: Seconds = 60.0  # a server that was silent for so long is given up
    max_restarts: Count = 3  # of each server that we started; then it stays away
    wait_s: Seconds = 900.0  # with no server left, wait this long for one; then save and stop
    max_concurrency: Positive = 256  # generate calls in flight, per server
    max_running_tokens: Positive | None = None  # tokens of the calls in flight, per server; None: what its cache holds
    threads: Positive | None = None  # CPU threads; None: one on CPU

    @property
    def servers(self) -> int:
        """Servers of the run, started or given."""
        return len(self.urls) or self.count


class SyncSection(Section):
    """Weights from trainer to engines."""

    # broadcast: a process group of trainer and engines; ipc: handles to memory of one machine; disk: a folder that both
    # can read. auto: ipc for colocated engines, else broadcast
    transport: Literal["auto", "broadcast", "ipc", "disk"] = "auto"
    # weights travel in buckets of at most this size, larger tensors alone; two buckets exist at a time. None: 512 on
    # GPUs, 128 on CPU
    bucket_mb: Annotated[float, Field(gt=0)] | None = None
    # generations in flight go on with the cache they have (in_place) or one made anew (retract), or are lost (abort)
    pause: Literal["in_place", "retract", "abort"] = "in_place"
    timeout_s: Seconds = 300.0  # deadline of every call and every collective of a sync
    disk_dir: Path | None = None  # where the disk transport writes; None: RUN_DIR/weights
    # checksums of all tensors at the first sync and at every n-th, of an n-th part at the others; 0: none at all
    verify_every: Count = 10
    max_probe_gap: float = Field(default=0.1, gt=0)  # mean |trainer - engine| log-prob of the probe that stops the run
    max_logprob_gap: float = Field(default=0.5, gt=0)  # the same of a step's replies that the newest weights sampled

    def transport_for(self, placement: str) -> Literal["broadcast", "ipc", "disk"]:
        """What `auto` comes to for engines of that `placement`."""
        if self.transport == "auto":
            return "ipc" if placement == "colocated" else "broadcast"
        return self.transport

    def bucket_mb_on(self, device: str) -> float:
        """MB of a bucket where the trainer runs on `device` (cpu | cuda)."""
        return self.bucket_mb or {"cuda": 512, "cpu": 128}[device]


class DataSection(Section):
    """Parquet files as written by tools/prepare_dataset.py."""

    train: Path
    validation: Path | None = None


class EvaluationSection(Section):
    """Whole conversations on held-out tasks."""

    num_tasks: Positive = 1000  # at most; fewer if the file has fewer
    temperature: float = Field(default=0.0, ge=0)
    max_assistant_turns: Positive = 3
    max_concurrency: Positive = 64
    timeout_s: Seconds = 1800.0
