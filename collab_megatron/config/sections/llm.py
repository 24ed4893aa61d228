"""The sections of the LLM roles (simulated users, judges, assistant), the reward and the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from collab_megatron.config.sections.base import Finite, Named, Positive, Seconds, Section, Share
from collab_megatron.config.sections.extra import check_address, check_extra
from collab_megatron.types import TERMINATION_SIGNAL

ROLES = ("user", "judge", "assistant", "second_judge")
"""Roles with a section of their own."""


def _free_name(name: str) -> str:
    if name in ROLES or name.startswith("judge-"):
        raise ValueError(f"{name} is the name of another role: choose another name")
    return name


RoleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$"), AfterValidator(_free_name)]
Address = Annotated[str, Field(min_length=1), AfterValidator(check_address)]


class DeploymentSection(Section):
    """One way to a model: a server, account or provider. Calls are spread over all deployments of a role."""

    model: Named  # in LiteLLM's terms: gpt-4o-mini, anthropic/claude-..., openai/NAME for any OpenAI-compatible server
    api_base: Address | None = None  # URL of a compatible server; None: the provider's own
    api_key_env: Named | None = "OPENAI_API_KEY"  # NAME of the environment variable with the key; None: no key
    requests_per_minute: Positive | None = None  # limit of the provider; None: no limit
    tokens_per_minute: Positive | None = None  # prompt and completion tokens together
    input_usd_per_mtoken: float | None = Field(default=None, ge=0)  # price; None: LiteLLM's table. 0: free
    output_usd_per_mtoken: float | None = Field(default=None, ge=0)  # as input_usd_per_mtoken


class LLMSection(DeploymentSection):
    """One role behind an LLM API: its first deployment, and the settings that all its deployments share."""

    temperature: float = Field(default=1.0, ge=0)  # sampling temperature
    max_tokens: Positive = 1024  # of one answer
    timeout_s: Seconds = 60.0  # deadline of one attempt
    deadline_s: Seconds = 240.0  # deadline of one call, its retries included
    max_attempts: Positive = 5  # requests of one call
    max_concurrency: Positive = 64  # calls in flight, over all deployments; fewer while the provider pushes back
    deployments: tuple[DeploymentSection, ...] = ()  # further ones, of equal standing: fail-over, more limits
    cooldown_s: Seconds = 20.0  # a deployment that failed gets no calls for this long, or for as long as it asks
    # response_format of requests whose prompt asks for JSON: text (none), json_object, or json_schema, which names the
    # fields too (json_object for models without it)
    response_format: Literal["text", "json_object", "json_schema"] = "json_object"
    prompt_file: Path | None = None  # replaces the shipped prompt template
    # at temperature 0: requests with the same messages are sent once, and all callers get the same answer
    answer_once: bool = False
    # further arguments of every call, in LiteLLM's terms, e.g. {top_p: 0.9, reasoning_effort: low}; no secrets.
    # LiteLLM leaves out OpenAI's arguments that it knows a provider not to take
    extra: dict[str, Any] = Field(default={})

    @field_validator("extra")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_extra(value)


class JudgeSection(LLMSection):
    """An LLM that scores. At temperature 0 it repeats its scores as far as its provider can."""

    temperature: float = Field(default=0.0, ge=0)  # sampling temperature
    # at temperature 0: requests with the same messages are sent once, and all callers get the same answer
    answer_once: bool = True


class SimulatorSection(LLMSection):
    """A simulated user. With a mixture of several, the policy does not learn the habits of one simulator."""

    weight: float = Field(default=1.0, gt=0)  # share of the conversations, relative to the other weights
    # ask for the first user turns of all futures of a reply in one request (`n`), which has the prompt's tokens once.
    # None: if LiteLLM knows that the providers of all deployments take `n`. A provider that returns fewer answers than
    # `n` is asked for the rest one after another, which takes longer: set false
    first_turns_together: bool | None = None


class UserSection(SimulatorSection):
    """The simulated users. A conversation keeps the one that it started with."""

    # a user turn that contains this text ends the chat; prompts get it as $termination_signal. CollabLLM and the verl
    # recipe use [[TERMINATE CHAT]]
    termination_signal: Annotated[str, Field(min_length=1, pattern=r"\S")] = TERMINATION_SIGNAL
    mixture: tuple[SimulatorSection, ...] = ()  # others next to this one


class HealthSection(Section):
    """Limits on odd replies of a simulator, as shares of a step's replies, by name of the check.

    The checks are those of rollout/llm/health.py. A limit takes effect from `min_replies` replies of a step on.
    """

    warn: dict[str, Share] = Field(default={})  # warns; checks that are not named keep their default limits
    stop: dict[str, Share] = Field(default={})  # saves a checkpoint and stops the run; no limit by default
    min_replies: Positive = 50  # of a step, from which limits take effect


class SimulatorsSection(Section):
    """The LLMs around the policy."""

    user: UserSection
    # needed by every metric that asks an LLM (docs/rewards.md), unless reward.judges has one for it
    judge: JudgeSection | None = None
    assistant: LLMSection | None = None  # only for tools/build_dataset.py: proposes the candidate replies
    # further LLMs for metrics, by name. bleu_score and pass_rate ask `extractor` where there is one; metrics of your
    # own ask any (docs/rewards.md)
    roles: dict[RoleName, JudgeSection] = Field(default={})
    health: HealthSection = HealthSection()

    @field_validator("judge", mode="before")
    @classmethod
    def _any_llm(cls, value: Any) -> Any:
        """Take the section of another LLM role, for configs that are made in Python."""
        if isinstance(value, LLMSection) and not isinstance(value, JudgeSection):
            return value.model_dump(exclude_unset=True, include=set(LLMSection.model_fields))
        return value


class RewardSection(Section):
    """R* = sum over metrics of clamp(weight * score). token_amount is in thousands of assistant tokens, unless
    reward.settings.token_amount.unit says otherwise."""

    # by metric; only metrics with a weight are computed. In a file the mapping replaces that of the files it extends;
    # on the command line reward.metric_weights.NAME=1 adds one metric and =null removes it
    metric_weights: dict[str, Finite] = Field(default={"accuracy": 1.0, "interactivity": 1.0, "token_amount": -0.1})
    # by metric: the limit of |weight * score|, 1 for metrics that are not named; null: no limit
    metric_clamps: dict[str, Annotated[float, Field(gt=0)] | None] = Field(default={})
    # rules: an equal answer, or mathematics that math-verify compares, is decided by rule, and the rest by an LLM;
    # exact: compare the last turn with the reference answer; judge: always ask an LLM
    accuracy_verifier: Literal["rules", "exact", "judge"] = "rules"
    # what the judge of interactivity sees. request: the whole task too, so that it can tell what a question should have
    # asked; chat: the conversation only, like the paper's ITR judge
    interactivity_sees: Literal["request", "chat"] = "request"
    # replaces the shipped prompt of the accuracy judge; simulators.judge.prompt_file replaces that of interactivity
    accuracy_prompt_file: Path | None = None
    # Python modules that register metrics of your own (docs/rewards.md): names that Python can import, or files; for a
    # module next to the config file the name is enough
    metric_modules: tuple[str, ...] = ()
    judges: dict[str, JudgeSection] = Field(default={})  # by metric: its own LLM instead of simulators.judge
    settings: dict[str, dict[str, Any]] = Field(default={})  # by metric: its settings (docs/rewards.md)
    # another LLM that scores a sample of the training's conversations again, with the prompts of the first judges. It
    # never rewards: its agreement with them is in the reward-hacking panel (hacking/...). None: no sample
    second_judge: JudgeSection | None = None
    second_judge_share: Share = 0.05  # share of the conversations that the second judge scores

    @field_validator("metric_weights")
    @classmethod
    def _some_metric(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("it is empty: set at least one metric with its weight, such as {accuracy: 1.0}")
        return value


class BudgetSection(Section):
    """Caps on the cost of the LLM APIs over the whole run: all its processes, resumes included.

    At a soft cap the run warns. A hard cap limits what may start: a conversation tree (in an evaluation and in the data
    engine, a conversation) starts only while the cost so far, plus what all work in progress may still cost, is below
    the cap. So the run ends within one tree's cost above the cap: it saves a checkpoint and exits with code 3. Trees
    that do not fill a batch are in the journal; a resumed run does not pay for them again. A cap in dollars needs the
    price of every model, from LiteLLM's table or from the config; the first tree runs alone, until its cost is known.
    """

    soft_usd: float | None = Field(default=None, gt=0)  # None: no cap
    hard_usd: float | None = Field(default=None, gt=0)  # None: no cap
    soft_calls: Positive | None = None  # requests; None: no cap
    hard_calls: Positive | None = None  # requests; None: no cap
