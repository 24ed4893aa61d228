"""The sections of what is asked over an LLM API: simulated users, judges, rewards, the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from collab_megatron.config.sections.base import Finite, Named, Positive, Seconds, Section, Share
from collab_megatron.config.sections.extra import check_address, check_extra

Address = Annotated[str, Field(min_length=1), AfterValidator(check_address)]


class DeploymentSection(Section):
    """Another way to the same model: a second server, account or provider. LiteLLM's Router spreads calls over all."""

    model: Named  # in LiteLLM's terms
    api_base: Address | None = None
    api_key_env: Named | None = "OPENAI_API_KEY"
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    input_usd_per_mtoken: float | None = Field(default=None, ge=0)
    output_usd_per_mtoken: float | None = Field(default=None, ge=0)


class LLMSection(Section):
    """One role behind an LLM API, in LiteLLM's terms."""

    model: Named  # e.g. gpt-4o-mini, anthropic/claude-..., openai/NAME for any OpenAI-compatible server
    api_base: Address | None = None  # URL of a compatible server; None: the provider's own
    api_key_env: Named | None = "OPENAI_API_KEY"  # NAME of the environment variable that holds the key; None: no key
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
    input_usd_per_mtoken: float | None = Field(default=None, ge=0)  # price; None: LiteLLM's table. 0: it is free
    output_usd_per_mtoken: float | None = Field(default=None, ge=0)
    # further arguments of every call, in LiteLLM's terms, e.g. {top_p: 0.9, reasoning_effort: low}; no secrets.
    # LiteLLM leaves out OpenAI's arguments that it knows a provider not to take
    extra: dict[str, Any] = Field(default={})

    @field_validator("extra")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_extra(value)


class JudgeSection(LLMSection):
    """An LLM that scores. It gives the same conversation the same score as far as its provider can."""

    temperature: float = Field(default=0.0, ge=0)


class SimulatorSection(LLMSection):
    """A simulated user. A mixture of several keeps the policy from learning one simulator's habits."""

    weight: float = Field(default=1.0, gt=0)  # share of the conversations, relative to the others' weights


class UserSection(SimulatorSection):
    """The simulated users; each conversation keeps the one that it began with."""

    # what a user turn holds that ends the chat: prompts get it as $termination_signal. The original and the verl recipe
    # have [[TERMINATE CHAT]]
    termination_signal: Annotated[str, Field(min_length=1, pattern=r"\S")] = "[TERMINATE]"
    mixture: tuple[SimulatorSection, ...] = ()  # others next to the one that stands here


class HealthSection(Section):
    """How many of a simulator's replies may be odd (share of a step's replies), by name of the check: see
    simulators/health.py. Nothing happens before `min_replies` replies of a step."""

    warn: dict[str, Share] = Field(
        default={}
    )  # said on the terminal; the shipped limits hold for checks that are not named
    stop: dict[str, Share] = Field(default={})  # saves a checkpoint and stops the run; none by default
    min_replies: Positive = 50


class SimulatorsSection(Section):
    """The LLMs around the policy."""

    user: UserSection
    # needed by interactivity and by accuracy_verifier: judge, unless reward.judges names others for them
    judge: JudgeSection | None = None
    assistant: LLMSection | None = None  # only tools/build_dataset.py: who proposes the candidate replies
    health: HealthSection = HealthSection()

    @field_validator("judge", mode="before")
    @classmethod
    def _any_llm(cls, value: Any) -> Any:
        """Made in Python, another LLM's section may judge too."""
        if isinstance(value, LLMSection) and not isinstance(value, JudgeSection):
            return value.model_dump(exclude_unset=True, include=set(LLMSection.model_fields))
        return value


class RewardSection(Section):
    """R* = sum over metrics of clamp(weight * score, -1, 1). token_amount counts assistant tokens in thousands."""

    metric_weights: dict[str, Finite] = Field(default={"accuracy": 1.0, "interactivity": 1.0, "token_amount": -0.1})
    accuracy_verifier: Literal["exact", "judge"] = "judge"
    # request: the judge of interactivity knows the whole task and can tell what a question should have asked; chat: it
    # knows the conversation alone, as the paper's ITR judge does
    interactivity_sees: Literal["request", "chat"] = "request"
    # replaces the shipped prompt of accuracy's judge; simulators.judge.prompt_file replaces that of interactivity
    accuracy_prompt_file: Path | None = None
    # Python modules that register metrics of your own (docs/rewards.md): names that Python finds, or files; of a module
    # that lies next to the config file the name is enough
    metric_modules: tuple[str, ...] = ()
    judges: dict[str, JudgeSection] = Field(default={})  # by metric: an LLM of its own, in place of simulators.judge
    settings: dict[str, dict[str, Any]] = Field(default={})  # by metric: what it is made with (docs/rewards.md)

    @field_validator("metric_weights")
    @classmethod
    def _some_metric(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("it is empty: name at least one metric with its weight, such as {accuracy: 1.0}")
        return value


class BudgetSection(Section):
    """What the LLM APIs may cost over the whole run, resumes included, over all its processes. At a soft cap the run
    reports it. A hard cap is kept by what begins: a conversation tree (in an evaluation and in the data engine a
    conversation) begins only while what was spent, and what all that are under way may still cost, is below the cap. So
    the run ends within one tree's cost above the cap, after saving a checkpoint, with exit code 3; trees that do not
    make a whole batch are in the journal, and a resumed run does not pay for them again. A cap in dollars needs a known
    price of every model: LiteLLM's, or a typed one; the first tree then runs alone, until its price is known."""

    soft_usd: float | None = Field(default=None, gt=0)
    hard_usd: float | None = Field(default=None, gt=0)
    soft_calls: Positive | None = None
    hard_calls: Positive | None = None
