"""The configs of the entry points: their sections, and the checks that compare sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from collab_megatron.config.cross_checks import (
    check_comparison,
    check_credit,
    check_driver,
    check_engine,
    check_metrics,
    check_packing,
    check_pairs,
    check_ranks,
    check_schedule,
    check_transport,
    check_validation,
)
from collab_megatron.config.roles import (
    evaluation_roles,
    llm_roles,
    llms_of_conversations,
    llms_of_evaluation,
    role_place,
)
from collab_megatron.config.sections import (
    AlgorithmSection,
    BudgetSection,
    ComparedModelSection,
    ComparisonSection,
    Count,
    DataSection,
    DPOSection,
    DriverSection,
    EngineSection,
    EvaluationSection,
    FolderOrHubName,
    JournalSection,
    LLMSection,
    MappingSection,
    ModelName,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    Positive,
    PreferenceSection,
    ProfileSection,
    RecordSection,
    ReplaySection,
    RewardSection,
    RolloutSection,
    RunSection,
    Section,
    Seed,
    SimulatorsSection,
    SyncSection,
    TrainSection,
    Umask,
)
from collab_megatron.config.sections.algorithms import check_refills
from collab_megatron.config.sections.evaluation import without_removed
from collab_megatron.config.timeouts import check_timeouts


class RLConfig(Section):
    """`python -m collab_megatron.train_rl`."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    simulators: SimulatorsSection
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    online_dpo: PreferenceSection | None = None
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
    profile: ProfileSection = ProfileSection()
    replay: ReplaySection | None = None

    @property
    def extra_roles(self) -> dict[str, LLMSection]:
        """Roles of the LLM gateway that only the evaluation has."""
        return evaluation_roles(self.evaluation)

    @property
    def evaluates(self) -> bool:
        """Whether the run plays held-out conversations; a replay has no engines for them."""
        return self.data.validation is not None and self.replay is None

    @property
    def needs_reference(self) -> bool:
        """Whether the trainer computes log-probs of a frozen reference."""
        return self.online_dpo is not None or self.algorithm.kl_coef > 0

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        check_metrics(self.reward, self.simulators)
        if self.train.epochs is None:
            check_schedule(self.optimizer, self.train.steps * self.algorithm.mini_batches)
        check_packing(self.parallel, self.train)
        if self.online_dpo is not None:
            check_pairs(self.parallel)
        samples = self.rollout.prompts_per_step * self.rollout.num_replies
        check_ranks(self.parallel, samples, "rollout.prompts_per_step x num_replies")
        if not any(self.reward.metric_weights.values()):
            raise ValueError("reward.metric_weights are all 0, so all replies would have the same reward: raise one")
        check_credit(self.algorithm, self.rollout, self.online_dpo)
        check_engine(self.engine)
        check_transport(self.engine, self.sync)
        check_driver(self.driver, self.rollout, self.engine, self.sync)
        check_timeouts(
            run=self.run,
            parallel=self.parallel,
            sync=self.sync,
            driver=self.driver,
            engine=self.engine,
            evaluation=self.evaluation if self.data.validation is not None else None,
            llms=llms_of_conversations(self.simulators, self.reward),
        )
        check_timeouts(evaluation=self.evaluation, llms=llms_of_evaluation(self.evaluation))
        if self.rollout.min_replies > self.rollout.num_replies:
            raise ValueError(
                f"rollout.min_replies={self.rollout.min_replies} is larger than "
                f"rollout.num_replies={self.rollout.num_replies}, so every group would be dropped: lower it"
            )
        if self.algorithm.mini_batches > self.rollout.prompts_per_step:
            raise ValueError(
                f"algorithm.mini_batches={self.algorithm.mini_batches} is larger than "
                f"rollout.prompts_per_step={self.rollout.prompts_per_step}: lower it"
            )
        check_refills(self.algorithm.baseline, self.driver.refill_groups)
        check_validation(self.data, self.train)
        return self


class SupervisedConfig(Section):
    """Training on rows of a dataset, without engines and driver."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    batch_size: Positive = 64  # conversations (DPO: pairs) per optimizer step, over all data ranks
    max_tokens: Positive = 4096  # longer conversations (DPO: pairs with a longer reply) are left out and counted
    optimizer: OptimizerSection = OptimizerSection()
    parallel: ParallelSection = ParallelSection()
    export_hf: Path | None = None  # folder for the final weights, as a Hugging Face model; null: no export
    # weights that export_hf gets. best: those with the lowest held-out loss (the last ones without data.validation or
    # train.keep_best)
    export_weights: Literal["best", "last"] = "best"
    profile: ProfileSection = ProfileSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if self.train.epochs is None:
            check_schedule(self.optimizer, self.train.steps)
        check_packing(self.parallel, self.train)
        check_ranks(self.parallel, self.batch_size, "batch_size")
        check_timeouts(run=self.run, parallel=self.parallel)
        check_validation(self.data, self.train)
        return self


class SFTConfig(SupervisedConfig):
    """`python -m collab_megatron.train_sft`."""

    run: RunSection = RunSection(name="sft")
    optimizer: OptimizerSection = OptimizerSection(lr=1e-5)


class DPOConfig(SupervisedConfig):
    """`python -m collab_megatron.train_dpo`."""

    run: RunSection = RunSection(name="dpo")
    optimizer: OptimizerSection = OptimizerSection(lr=5e-6)
    dpo: DPOSection = DPOSection()

    @model_validator(mode="after")
    def _checks_of_pairs(self) -> Self:
        check_pairs(self.parallel)
        return self


class EvaluateConfig(Section):
    """`python -m collab_megatron.evaluate`: whole conversations with a fixed model.

    It accepts an RL config too: sections that only training reads are checked and not used.
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
    # models to compare, by name, such as {base: {}, base+proactive: {proactive: true}, rl: {path: runs/mine/sft_hf}}.
    # NAME: null leaves an inherited one out. Empty: model.path alone
    models: dict[ModelName, ComparedModelSection] = Field(default={})
    compare: ComparisonSection = ComparisonSection()
    # JSON file for the figures; table and conversations go next to it. With `models` the name of each follows that of
    # this file. None: RUN_DIR/evaluations/NAME/MODEL.json
    output: Path | None = None
    # sections of an RL config: checked, not used
    algorithm: AlgorithmSection | None = None
    online_dpo: PreferenceSection | None = None
    train: TrainSection | None = None
    optimizer: OptimizerSection | None = None
    profile: ProfileSection | None = None
    replay: ReplaySection | None = None
    record: RecordSection | None = None
    sync: SyncSection | None = None
    driver: DriverSection | None = None

    @field_validator("models", mode="before")
    @classmethod
    def _without_removed(cls, value: Any) -> Any:
        return without_removed(value)

    @property
    def rows(self) -> dict[str, ComparedModelSection]:
        """The models to evaluate by name; without `models` one without a name."""
        return self.models or {"": ComparedModelSection()}

    @property
    def extra_roles(self) -> dict[str, LLMSection]:
        """Further users and API models, as roles of the LLM gateway."""
        return evaluation_roles(self.evaluation, self.models)

    @property
    def served(self) -> list[str]:
        """Paths of the models that SGLang serves, each once."""
        return list(dict.fromkeys(row.path or self.model.path for row in self.rows.values() if row.api is None))

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        check_metrics(self.reward, self.simulators)
        check_engine(self.engine)
        check_timeouts(
            engine=self.engine,
            evaluation=self.evaluation,
            llms=llms_of_conversations(self.simulators, self.reward) | llms_of_evaluation(self.evaluation, self.models),
        )
        check_comparison(self.models, self.compare, self.simulators, self.engine)
        if self.data.validation is None:
            raise ValueError("data.validation is not set: name a parquet file of held-out tasks")
        if self.output is not None and self.output.suffix == ".jsonl":
            raise ValueError(
                f"output={self.output} is the name for the conversations: name a .json file for the figures"
            )
        return self


class BuildDatasetConfig(Section):
    """`tools/build_dataset.py`: grow multi-turn conversations from single-turn problems."""

    # a hub name, a folder or a file of parquet, JSON or JSONL. Without `mapping` its columns are single_turn_prompt,
    # single_turn_completion, [single_turn_metadata], [prompt], [task_desc]
    problems: FolderOrHubName
    problems_split: tuple[str, ...] = ()  # splits of a hub or saved dataset; empty: train
    problems_subset: str | None = None  # configuration of a hub dataset; None: its default
    mapping: MappingSection | None = None  # columns of another dataset
    on_bad_problem: Literal["stop", "skip"] = "stop"  # a row that is no usable problem; skipped ones are counted
    output: Path  # folder; an interrupted build resumes in it and makes no conversation twice
    form: Literal["flat", "nested"] = "flat"  # of the rows: one a candidate reply, or one a conversation (docs/data.md)
    umask: Umask = "077"  # permissions of that folder and its files, as run.umask
    tokenizer: FolderOrHubName | None = None  # counts tokens for token_amount; None: counts words
    simulators: SimulatorsSection
    reward: RewardSection = RewardSection()
    seed: Seed = 1  # of LLM calls
    num_conversations: Positive | None = None  # the first so many problems; None: all
    num_candidate_responses: Positive = 2  # candidate replies per assistant turn; the best one is kept
    # of these, how many the assistant writes under a prompt that asks for collaboration and shows it the whole request
    # and the reference answer. The replies inside futures never see either
    num_proactive_candidates: Count = 0
    proactive_prompt_file: Path | None = None  # replaces the shipped prompt of these candidates
    num_repeat_rollouts: Annotated[int, Field(ge=1)] = 1  # futures per candidate
    max_total_turns: Positive = 4  # assistant turns per conversation
    max_user_turns: Count = 2  # user turns inside a scored future
    max_concurrency: Positive = 32  # conversations at a time, per process
    processes: Positive = 1  # each grows its share of the problems
    system_prompt: str = ""  # first message of every prompt; empty: none
    # a model that the build serves with SGLang as the assistant: simulators.assistant then has sampling settings and no
    # model. None: simulators.assistant names an API model
    model: ModelSection | None = None
    engine: EngineSection = EngineSection()  # of `model`
    parallel: ParallelSection = ParallelSection()  # only `device` and `threads` are read
    budget: BudgetSection = BudgetSection()  # of the whole build, over all processes and restarts
    # every paid reply, so that a resumed build pays for none twice. path: None is OUTPUT/journal.sqlite. It is emptied
    # when the build is complete, unless keep_all is set
    journal: JournalSection = JournalSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        check_metrics(self.reward, self.simulators)
        check_timeouts(llms={role_place(role): llm for role, llm in llm_roles(self.simulators, self.reward).items()})
        if self.simulators.assistant is None:
            raise ValueError("simulators.assistant is not set: name the model that writes the candidate replies")
        if self.num_proactive_candidates > self.num_candidate_responses:
            raise ValueError(
                f"num_proactive_candidates={self.num_proactive_candidates} is more than "
                f"num_candidate_responses={self.num_candidate_responses}: lower it"
            )
        check_engine(self.engine)
        return self

    @model_validator(mode="before")
    @classmethod
    def _assistant_of_our_own(cls, values: Any) -> Any:
        """simulators.assistant of a model that the build serves."""
        model, simulators = (values.get(key) if isinstance(values, dict) else None for key in ("model", "simulators"))
        if not isinstance(model, dict) or not isinstance(simulators, dict):
            return values
        assistant = simulators.get("assistant") or {}
        if not isinstance(assistant, dict):
            return values
        if twice := [key for key in ("model", "api_base", "deployments") if assistant.get(key)]:
            raise ValueError(
                f"model names the assistant that the build serves, and simulators.assistant.{twice[0]} names another: "
                "remove one of them"
            )
        own = {"model": f"hosted_vllm/{model.get('path')}", "api_key_env": None}
        free = {"input_usd_per_mtoken": 0, "output_usd_per_mtoken": 0}
        return {**values, "simulators": {**simulators, "assistant": {**free, **assistant, **own}}}

    @property
    def counting_tokenizer(self) -> str | None:
        """What counts tokens: `tokenizer`, else that of the model that the build serves."""
        return self.tokenizer or (self.model.path if self.model else None)

    @property
    def run(self) -> RunSection:
        """Where the servers of `model` log, and their seed."""
        return RunSection(dir=self.output, name="build", seed=self.seed, umask=self.umask)
