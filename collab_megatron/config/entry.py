"""The configurations of the entry points: sections put together, and the checks that need two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from collab_megatron.config.sections import (
    AlgorithmSection,
    BudgetSection,
    Count,
    DataSection,
    DriverSection,
    EngineSection,
    EvaluationSection,
    JournalSection,
    LLMSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    Positive,
    RecordSection,
    RewardSection,
    RolloutSection,
    RunSection,
    Section,
    SimulatorsSection,
    SyncSection,
    TrainSection,
    Umask,
    UserSection,
)
from collab_megatron.config.sections.extra import shown_address
from collab_megatron.config.timeouts import check_timeouts

MAX_PORT = 65535
JUDGE_OF = "judge-"  # begins the role of a metric's own judge


def _check_metrics(reward: RewardSection, simulators: SimulatorsSection) -> None:
    lacking = [name for name, judge in shipped_judges(reward, simulators).items() if judge is None]
    if lacking:
        raise ValueError(f"{lacking[0]} needs an LLM judge: set simulators.judge, or reward.judges.{lacking[0]}")
    accuracy = reward.judges.get("accuracy")
    if reward.accuracy_prompt_file is not None and accuracy is not None and accuracy.prompt_file is not None:
        raise ValueError(
            "reward.accuracy_prompt_file and reward.judges.accuracy.prompt_file name two prompts for one judge: remove "
            "one of them"
        )


def _check_schedule(optimizer: OptimizerSection, steps: int) -> None:
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves nothing of {steps} optimizer steps to decay over: "
            "lower it, or set optimizer.schedule=constant"
        )


def _check_packing(parallel: ParallelSection, train: TrainSection) -> None:
    if train.packing and parallel.context > 1:
        raise ValueError("train.packing and parallel.context > 1 do not go together yet: set one of them back")


def _check_engine(engine: EngineSection) -> None:
    if engine.urls and engine.count > 1:
        raise ValueError("engine.urls names servers that run, engine.count starts some: set one of the two only")
    if engine.port and engine.port + engine.count - 1 > MAX_PORT:
        raise ValueError(f"engine.port={engine.port} leaves no ports for engine.count={engine.count} servers: lower it")
    for url in engine.urls:
        if not _host(url):
            raise ValueError(f"engine.urls: {shown_address(url)!r} is no address of the form http://HOST:PORT")
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        raise ValueError("engine.urls names a server twice: name each once")


def _check_driver(driver: DriverSection, rollout: RolloutSection, engine: EngineSection, sync: SyncSection) -> None:
    prompts = rollout.prompts_per_step
    if driver.shards > prompts:
        raise ValueError(f"driver.shards={driver.shards} leaves shards without any of {prompts} prompts: lower it")
    if driver.oversample_prompts and not driver.max_staleness:
        raise ValueError("driver.oversample_prompts carries trees over to the next step: set driver.max_staleness to 1")
    if driver.oversample_prompts > prompts:
        raise ValueError("driver.oversample_prompts is more than a batch: raise driver.max_staleness instead")
    if driver.max_staleness and engine.placement == "colocated":
        raise ValueError(
            "driver.max_staleness needs engines that sample while the trainer trains: set "
            "engine.placement=disaggregated"
        )
    if driver.max_staleness and sync.pause == "abort":
        raise ValueError("sync.pause=abort would lose what is sampled across an update: set driver.max_staleness=0")
    if driver.refill_groups > prompts:
        raise ValueError("driver.refill_groups is more than a batch: lower it")
    if driver.min_futures > max(rollout.num_repeat_rollouts, 1):
        raise ValueError("driver.min_futures is larger than rollout.num_repeat_rollouts: no reply could have a reward")
    if driver.order == "prompt" and driver.oversample_prompts:
        raise ValueError("driver.order=prompt waits for every prompt of a step: set driver.oversample_prompts to 0")


def _check_transport(engine: EngineSection, sync: SyncSection) -> None:
    """Memory of one machine cannot be handed to another."""
    far = [url for url in engine.urls if not _is_loopback(_host(url))]
    if far and sync.transport_for(engine.placement) == "ipc":
        raise ValueError(
            f"sync.transport=ipc reaches engines on this machine only, and {far[0]} is not a loopback address: set "
            "sync.transport=broadcast or disk, and engine.placement=disaggregated"
        )


def _host(url: str) -> str:
    """Empty where there is none."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "") if parts.scheme in ("http", "https") and parts.port != 0 else ""
    except ValueError:  # a port that is no number
        return ""


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


class RLConfig(Section):
    """`python -m collab_megatron.train_rl`."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    simulators: SimulatorsSection
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    sync: SyncSection = SyncSection()
    driver: DriverSection = DriverSection()
    journal: JournalSection = JournalSection()
    record: RecordSection = RecordSection()
    budget: BudgetSection = BudgetSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        _check_metrics(self.reward, self.simulators)
        if self.train.epochs is None:
            _check_schedule(self.optimizer, self.train.steps * self.algorithm.mini_batches)
        _check_packing(self.parallel, self.train)
        _check_engine(self.engine)
        _check_transport(self.engine, self.sync)
        _check_driver(self.driver, self.rollout, self.engine, self.sync)
        check_timeouts(
            run=self.run,
            parallel=self.parallel,
            sync=self.sync,
            rollout=self.rollout,
            driver=self.driver,
            engine=self.engine,
            evaluation=self.evaluation if self.data.validation is not None else None,
            llms=_llms_of_conversations(self.simulators, self.reward),
        )
        if self.rollout.min_replies > self.rollout.num_replies:
            raise ValueError("rollout.min_replies is larger than rollout.num_replies: no group could ever be kept")
        if self.algorithm.mini_batches > self.rollout.prompts_per_step:
            raise ValueError("algorithm.mini_batches is larger than rollout.prompts_per_step: lower it")
        if self.train.eval_interval and self.data.validation is None:
            raise ValueError("train.eval_interval is set but data.validation is not: name a validation parquet")
        return self


class SFTConfig(Section):
    """`python -m collab_megatron.train_sft`."""

    run: RunSection = RunSection(name="sft")
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    batch_size: Positive = 64  # conversations per optimizer step, over all data ranks
    max_tokens: Positive = 4096  # longer conversations are left out and counted
    optimizer: OptimizerSection = OptimizerSection(lr=1e-5)
    parallel: ParallelSection = ParallelSection()
    export_hf: Path | None = None  # where the weights go as a Hugging Face folder at the end
    # best: those with the lowest held-out loss; the last ones without data.validation or train.keep_best
    export_weights: Literal["best", "last"] = "best"

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if self.train.epochs is None:
            _check_schedule(self.optimizer, self.train.steps)
        _check_packing(self.parallel, self.train)
        check_timeouts(run=self.run, parallel=self.parallel)
        if self.train.eval_interval and self.data.validation is None:
            raise ValueError("train.eval_interval is set but data.validation is not: name a validation parquet")
        return self


class EvaluateConfig(Section):
    """`python -m collab_megatron.evaluate`: whole conversations with a model as it stands.

    An RL config is one as well: the sections that only training reads are checked and not used.
    """

    run: RunSection = RunSection(name="evaluate")
    model: ModelSection
    data: DataSection
    simulators: SimulatorsSection
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()
    engine: EngineSection = EngineSection()
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    journal: JournalSection = JournalSection()
    budget: BudgetSection = BudgetSection()
    # JSON with the figures; the conversations lie next to it as .jsonl. None: RUN_DIR/evaluations/NAME/MODEL.json
    output: Path | None = None
    # of an RL config: checked, not used
    algorithm: AlgorithmSection | None = None
    train: TrainSection | None = None
    optimizer: OptimizerSection | None = None
    sync: SyncSection | None = None
    driver: DriverSection | None = None

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        _check_metrics(self.reward, self.simulators)
        _check_engine(self.engine)
        check_timeouts(
            engine=self.engine,
            evaluation=self.evaluation,
            llms=_llms_of_conversations(self.simulators, self.reward),
        )
        if self.data.validation is None:
            raise ValueError("data.validation is not set: name the held-out parquet")
        if self.output is not None and self.output.suffix == ".jsonl":
            raise ValueError(f"output={self.output} is where its conversations go: name a .json file for the figures")
        return self


class BuildDatasetConfig(Section):
    """`tools/build_dataset.py`: grow multi-turn conversations from single-turn problems."""

    problems: Path  # JSONL: single_turn_prompt, single_turn_completion, [single_turn_metadata], [prompt]
    output: Path  # folder; conversations are appended, finished ones are never made twice
    umask: Umask = "077"  # whom that folder and its files are kept from, as run.umask
    tokenizer: str | None = None  # HF folder that counts token_amount; None: whitespace words
    simulators: SimulatorsSection
    reward: RewardSection = RewardSection()
    seed: int = 1
    num_conversations: Positive | None = None  # None: all problems
    num_candidate_responses: Positive = 2
    num_repeat_rollouts: Annotated[int, Field(ge=1)] = 1  # futures per candidate
    max_total_turns: Positive = 4  # assistant turns per conversation
    max_user_turns: Count = 2  # user turns inside a scored future
    max_concurrency: Positive = 32  # conversations at a time, per process
    processes: Positive = 1
    system_prompt: str = ""  # put in front of every prompt when not empty
    budget: BudgetSection = BudgetSection()  # of the whole build, all its processes and restarts
    # every paid reply, so that an interrupted build asks for nothing twice. path: None is OUTPUT/journal.sqlite. It is
    # emptied when the build is complete, unless keep_all is set
    journal: JournalSection = JournalSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        _check_metrics(self.reward, self.simulators)
        check_timeouts(llms={role_place(role): llm for role, llm in llm_roles(self.simulators, self.reward).items()})
        if self.simulators.assistant is None:
            raise ValueError("simulators.assistant is not set: name the model that proposes the replies")
        return self


def llm_roles(simulators: SimulatorsSection, reward: RewardSection) -> dict[str, LLMSection]:
    """The roles that are configured, by name. A metric's own judge is `judge-METRIC`, where the metric has a weight."""
    named: dict[str, Any] = {"user": simulators.user, "judge": simulators.judge, "assistant": simulators.assistant}
    roles = {role: section for role, section in named.items() if section is not None}
    own = {judge_role(metric): judge for metric, judge in reward.judges.items() if metric in reward.metric_weights}
    return roles | own


def _llms_of_conversations(simulators: SimulatorsSection, reward: RewardSection) -> dict[str, LLMSection]:
    """Place in the config -> an LLM that a conversation of the policy waits for."""
    found: dict[str, LLMSection] = {}
    for role, section in llm_roles(simulators, reward).items():
        if role == "assistant":
            continue
        found[role_place(role)] = section
        if isinstance(section, UserSection):
            found |= {f"{role_place(role)}.mixture.{i}": other for i, other in enumerate(section.mixture)}
    return found


def judge_role(metric: str) -> str:
    """The role of a metric's own judge."""
    return f"{JUDGE_OF}{metric}"


def role_place(role: str) -> str:
    """Where in the config a role of `llm_roles` stands."""
    return f"reward.judges.{role.removeprefix(JUDGE_OF)}" if role.startswith(JUDGE_OF) else f"simulators.{role}"


def shipped_judges(reward: RewardSection, simulators: SimulatorsSection) -> dict[str, LLMSection | None]:
    """The judge of each weighted metric that is shipped and needs one; None where it lacks one."""
    judged = ["accuracy"] if reward.accuracy_verifier == "judge" else []
    return {
        name: reward.judges.get(name, simulators.judge)
        for name in (*judged, "interactivity")
        if name in reward.metric_weights
    }
