"""Registry of metrics by name, and the scorer of a run. A metric of your own:

    @register_metric("brevity")
    def brevity(context: MetricContext) -> Metric:
        return Brevity()

in a module listed in `reward.metric_modules`, and `reward.metric_weights: {brevity: 0.2}`; no trainer code changes.
docs/rewards.md has the details.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from collab_megatron.config.roles import EXTRACTOR, judge_role, own_metrics, role_of_metric, shipped_judges
from collab_megatron.config.sections import RewardSection, Section, SimulatorsSection
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm import Gateway
from collab_megatron.rollout.rewards.aggregate import Clamps
from collab_megatron.rollout.rewards.extraction import Extractor, Kind
from collab_megatron.rollout.rewards.interactivity import Sees
from collab_megatron.rollout.rewards.modules import import_metric_module
from collab_megatron.rollout.rewards.scorer import Scorer
from collab_megatron.types import ChatLLM, Metric

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class MetricContext:
    """The arguments of a metric's factory."""

    judge: ChatLLM | None  # None: no judge is configured
    accuracy_verifier: str = "judge"  # rules | exact | judge
    interactivity_sees: Sees = "request"
    prompt_file: Path | None = None  # replaces the shipped prompt of the metric's judge
    here: bool = True  # the metric will run on this machine; False: it is planned for another one
    name: str = ""  # the metric's
    roles: Mapping[str, ChatLLM] = field(default_factory=dict)  # those of simulators.roles
    raw_settings: Mapping[str, Any] = field(default_factory=dict)  # reward.settings.<name> from the config
    read: list[type[Section]] = field(default_factory=list, compare=False)  # classes that `settings` was called with

    def settings(self, kind: type[S]) -> S:
        """reward.settings.<name> as the metric's own frozen, typed subclass of config.sections.Section.

        Raises UserError naming a key that is unknown or has a bad value.
        """
        self.read.append(kind)
        return kind.read(self.raw_settings, f"reward.settings.{self.name}")

    def need_judge(self, metric: str) -> ChatLLM:
        """The judge. Raises UserError naming the metric if there is none."""
        if self.judge is None:
            raise UserError(f"metric {metric} needs an LLM judge: set simulators.judge, or reward.judges.{metric}")
        return self.judge

    def need_role(self, role: str) -> ChatLLM:
        """An LLM of simulators.roles by its name. Raises UserError if it is not configured."""
        if role not in self.roles:
            raise UserError(
                f"metric {self.name} asks the LLM {role!r}, which is not configured: set simulators.roles.{role}"
            )
        return self.roles[role]

    def extractor(self, kind: Kind) -> Extractor:
        """Finds the final document or code of a conversation: one call, however many metrics ask. Raises UserError
        without an LLM."""
        return Extractor(self.need_judge(self.name), kind, self.prompt_file)


MetricFactory = Callable[[MetricContext], Metric]

_FACTORIES: dict[str, MetricFactory] = {}


def register_metric(name: str) -> Callable[[MetricFactory], MetricFactory]:
    """Decorator that registers a metric's factory by `name`. Raises ValueError if the name is taken."""

    def register(factory: MetricFactory) -> MetricFactory:
        if name in _FACTORIES:
            raise ValueError(f"a metric named {name!r} is already registered")
        _FACTORIES[name] = factory
        return factory

    return register


def make_scorer(
    metric_weights: Mapping[str, float],
    judge: ChatLLM | None,
    *,
    accuracy_verifier: str = "judge",
    judges: Mapping[str, ChatLLM] | None = None,
    prompt_files: Mapping[str, Path | None] | None = None,
    interactivity_sees: Sees = "request",
    metric_modules: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    clamps: Clamps | None = None,
    roles: Mapping[str, ChatLLM] | None = None,
    here: bool = True,
) -> Scorer:
    """The scorer of a run. `metric_modules` are imported first, so that they can register metrics.

    By metric: `judges`, which replace `judge`; the `prompt_files` of the judges; `settings`; and `clamps`. `roles`: the
    LLMs that metrics may ask by name. Raises UserError for a
    module that cannot be imported, an unknown metric, a metric without its judge, settings that the metric does not
    take, or a factory that returns no metric.
    """
    for module in metric_modules:
        import_metric_module(module)
    context = MetricContext(judge, accuracy_verifier, interactivity_sees, here=here, roles=roles or {})
    settings, judges, prompt_files, clamps = settings or {}, judges or {}, prompt_files or {}, clamps or {}
    for place, names in (
        ("", metric_weights),
        ("reward.settings: ", settings),
        ("reward.judges: ", judges),
        ("reward.metric_clamps: ", clamps),
    ):
        unknown = sorted(set(names) - set(_FACTORIES))
        if unknown:
            raise UserError(f"{place}unknown metric {unknown[0]!r}; known are {', '.join(sorted(_FACTORIES))}")
    metrics = [
        _make(
            replace(
                context,
                judge=judges.get(name, judge),
                prompt_file=prompt_files.get(name),
                name=name,
                raw_settings=settings.get(name, {}),
                read=[],
            )
        )
        for name in metric_weights
    ]
    return Scorer(metrics, metric_weights, clamps)


def judge_calls(reward: RewardSection, simulators: SimulatorsSection) -> int:
    """Requests to judges per conversation, without retries.

    A metric of the user's own counts as one request, since the real number is unknown; the budget learns it from the
    first conversations.
    """
    return len(shipped_judges(reward, simulators)) + len(own_metrics(reward))


def configured_scorer(
    reward: RewardSection, simulators: SimulatorsSection, gateway: Gateway, *, here: bool = True
) -> Scorer:
    """The scorer of a config. Without `here` nothing is checked that depends on the machine. Raises UserError as
    make_scorer does, and for a bad prompt file."""
    own = [name for name in reward.judges if name in reward.metric_weights]
    extracting = [name for name in reward.metric_weights if role_of_metric(name, reward, simulators) == EXTRACTOR]
    return make_scorer(
        reward.metric_weights,
        None if simulators.judge is None else gateway.role("judge"),
        accuracy_verifier=reward.accuracy_verifier,
        judges={
            **{name: gateway.role(judge_role(name)) for name in own},
            **{name: gateway.role(EXTRACTOR) for name in extracting},
        },
        prompt_files=prompt_files(reward, simulators),
        interactivity_sees=reward.interactivity_sees,
        metric_modules=reward.metric_modules,
        settings=reward.settings,
        clamps=reward.metric_clamps,
        roles={name: gateway.role(name) for name in simulators.roles},
        here=here,
    )


def prompt_files(reward: RewardSection, simulators: SimulatorsSection) -> dict[str, Path | None]:
    """By metric: the file that replaces its shipped prompt."""
    judge, extractor = simulators.judge, simulators.roles.get(EXTRACTOR)
    extracting = [name for name in reward.metric_weights if role_of_metric(name, reward, simulators) == EXTRACTOR]
    own = {name: section.prompt_file for name, section in reward.judges.items() if name in reward.metric_weights}
    return {
        "interactivity": None if judge is None else judge.prompt_file,
        "accuracy": reward.accuracy_prompt_file,
        **{name: extractor.prompt_file for name in extracting if extractor is not None},
        **{name: file for name, file in own.items() if file is not None},
    }


def _make(context: MetricContext) -> Metric:
    """The metric from its factory. Raises UserError if the factory returns something else."""
    name = context.name
    metric = _FACTORIES[name](context)
    if not callable(getattr(metric, "score", None)):
        raise UserError(
            f"metric {name}: its factory returned a {type(metric).__name__} without a `score` method; add one"
        )
    if getattr(metric, "name", None) != name:
        raise UserError(
            f"metric {name}: its factory returned a metric that is named {getattr(metric, 'name', None)!r}; "
            f"set name = {name!r} on {type(metric).__name__}"
        )
    if context.raw_settings and not context.read:
        raise UserError(f"reward.settings.{name}: metric {name} takes no settings: remove them")
    return metric
