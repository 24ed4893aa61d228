"""The sections of an evaluation: held-out conversations, the models that are compared, their table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from collab_megatron.config.sections.base import Count, FolderOrHubName, Named, Positive, Seconds, Section, Seed
from collab_megatron.config.sections.llm import LLMSection

UserName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$")]


def without_removed(value: Any) -> Any:
    """A mapping without the names that `NAME: null` removes."""
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class EvaluationSection(Section):
    """Whole conversations on held-out tasks."""

    num_tasks: Positive = 1000  # tasks of one evaluation; fewer if the file has fewer
    seed: Seed = 1  # selects the tasks, the same at every step; a larger num_tasks only adds tasks
    # true: the simulated user writes the first message from the whole request, in place of the dataset's prompt (the
    # system message stays); in a file with openings only tasks with an opening are used
    simulated_opening: bool = False
    mixture: bool = True  # whether simulators.user.mixture plays too; false: simulators.user alone
    # further simulated users by name, such as one that training does not use. Each plays every task as well, and has
    # figures of its own, users/NAME/...
    users: dict[UserName, LLMSection] = Field(default={})  # NAME: null leaves an inherited one out
    temperature: float = Field(default=0.0, ge=0)  # sampling temperature of the policy
    max_assistant_turns: Positive = 3  # policy turns of a conversation
    max_concurrency: Positive = 64  # conversations at a time, over all users and shards
    # deadline of the evaluation of a model with all users; unfinished conversations count as failed
    timeout_s: Seconds = 1800.0
    # RL: evaluations whose conversations are kept in RUN_DIR/evaluations/NAME: the first and the newest
    keep_transcripts: Positive = 20

    @field_validator("users", mode="before")
    @classmethod
    def _without_removed(cls, value: Any) -> Any:
        return without_removed(value)


class ApiModelSection(LLMSection):
    """An API model in the place of the policy."""

    temperature: float = Field(default=0.0, ge=0)  # sampling temperature, in place of evaluation.temperature


class ComparedModelSection(Section):
    """One of several models that evaluate.py compares: weights that SGLang serves, or an API model."""

    path: FolderOrHubName | None = None  # Hugging Face folder, hub name or checkpoint; None: model.path
    api: ApiModelSection | None = None  # an API model; its tokens are counted with the tokenizer of model.path
    # whether it gets a system message that asks for collaboration, as the paper's proactive baseline; it is added to
    # the system message of the dataset
    proactive: bool = False
    proactive_prompt_file: Path | None = None  # replaces the shipped text of that message

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.path is not None and self.api is not None:
            raise ValueError("path and api are both set: a row of the table has one model, so remove one of them")
        if self.proactive_prompt_file is not None and not self.proactive:
            raise ValueError("proactive_prompt_file is set and proactive is false: set proactive to true")
        return self


class ComparisonSection(Section):
    """The table of an evaluation: means with bootstrap intervals, and differences to a baseline on the same tasks."""

    baseline: Named | None = None  # the model that others are compared with; None: the first of `models`
    confidence: float = Field(default=0.95, gt=0, lt=1)  # of the intervals
    resamples: Positive = 2000  # bootstrap samples of the tasks
    # tasks on which a judge says whether a model's conversation or the baseline's is better, in both orders: two calls
    # for each task, model and user. The judge is simulators.roles.pair_judge, else simulators.judge. 0: none
    judged_pairs: Count = 0
    prompt_file: Path | None = None  # replaces the shipped prompt of that judge
