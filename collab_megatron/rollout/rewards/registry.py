"""Metrics by name. A metric of your own:

    @register_metric("brevity")
    def brevity(context: MetricContext) -> Metric:
        return Brevity()

in a module that `reward.metric_modules` names, and `reward.metric_weights: {brevity: 0.2}`; no trainer code changes.
docs/rewards.md tells the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from collab_megatron.config.sections import Section
from collab_megatron.errors import UserError
from collab_megatron.rollout.rewards.accuracy import ExactAccuracy, JudgedAccuracy
from collab_megatron.rollout.rewards.interactivity import Interactivity, Sees
from collab_megatron.rollout.rewards.modules import import_metric_module
from collab_megatron.rollout.rewards.scorer import Scorer
from collab_megatron.rollout.rewards.token_amount import TokenAmount
from collab_megatron.types import ChatLLM, Metric

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class MetricContext:
    """What a metric may be made of."""

    judge: ChatLLM | None  # None: no judge is configured
    accuracy_verifier: str = "judge"  # exact | judge
    interactivity_sees: Sees = "request"
    prompt_file: Path | None = None  # of the metric's judge; replaces a shipped prompt
    name: str = ""  # under which the metric was registered
    raw_settings: Mapping[str, Any] = field(default_factory=dict)  # reward.settings.<name>, as it stands in the config
    read: list[type[Section]] = field(default_factory=list, compare=False)  # kinds of settings that were asked for

    def settings(self, kind: type[S]) -> S:
        """reward.settings.<name> as the metric's own section, a frozen, typed subclass of config.sections.Section.

        Raises UserError naming the key that is unknown or has a bad value.
        """
        self.read.append(kind)
        return kind.read(self.raw_settings, f"reward.settings.{self.name}")

    def need_judge(self, metric: str) -> ChatLLM:
        """The judge. Raises UserError naming the metric that cannot do without."""
        if self.judge is None:
            raise UserError(f"metric {metric} needs an LLM judge: set simulators.judge, or reward.judges.{metric}")
        return self.judge


MetricFactory = Callable[[MetricContext], Metric]

_FACTORIES: dict[str, MetricFactory] = {}


def register_metric(name: str) -> Callable[[MetricFactory], MetricFactory]:
    """Decorator that makes a metric known by `name`. Raises ValueError if the name is taken."""

    def register(factory: MetricFactory) -> MetricFactory:
        if name in _FACTORIES:
            raise ValueError(f"a metric named {name!r} is registered already")
        _FACTORIES[name] = factory
        return factory

    return register


def known_metrics() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_FACTORIES))


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
) -> Scorer:
    """The scorer of a run. `metric_modules` are imported first, so that they may register metrics. By metric:
    `judges`, who stand in for `judge` there, the `prompt_files` of their judges, and `settings`.

    Raises UserError for a module that cannot be imported, an unknown metric, one that lacks its judge, settings that no
    metric takes, or a factory that makes no metric.
    """
    for module in metric_modules:
        import_metric_module(module)
    context = MetricContext(judge, accuracy_verifier, interactivity_sees)
    settings, judges, prompt_files = settings or {}, judges or {}, prompt_files or {}
    for place, names in (("", metric_weights), ("reward.settings: ", settings), ("reward.judges: ", judges)):
        unknown = sorted(set(names) - set(_FACTORIES))
        if unknown:
            raise UserError(f"{place}unknown metric {unknown[0]!r}; known are {', '.join(known_metrics())}")
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
    return Scorer(metrics, metric_weights)


def _make(context: MetricContext) -> Metric:
    """The metric of one factory. Raises UserError for what is none."""
    name = context.name
    metric = _FACTORIES[name](context)
    if not callable(getattr(metric, "score", None)):
        raise UserError(f"metric {name}: its factory gave a {type(metric).__name__} without a `score` function")
    if getattr(metric, "name", None) != name:
        raise UserError(
            f"metric {name}: its factory gave one that is named {getattr(metric, 'name', None)!r}; set name = {name!r} "
            f"on {type(metric).__name__}"
        )
    if context.raw_settings and not context.read:
        raise UserError(f"reward.settings.{name}: metric {name} takes no settings; remove them")
    return metric


@register_metric("accuracy")
def _accuracy(context: MetricContext) -> Metric:
    if context.accuracy_verifier == "exact":
        return ExactAccuracy()
    return JudgedAccuracy(context.need_judge("accuracy"), context.prompt_file)


@register_metric("interactivity")
def _interactivity(context: MetricContext) -> Metric:
    return Interactivity(context.need_judge("interactivity"), context.prompt_file, sees=context.interactivity_sees)


@register_metric("token_amount")
def _token_amount(context: MetricContext) -> Metric:
    return TokenAmount()
