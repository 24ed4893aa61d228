"""Metrics by name. A metric of your own:

    @register_metric("brevity")
    def brevity(context: MetricContext) -> Metric:
        return Brevity()

in a module that `reward.metric_modules` names, and `reward.metric_weights: {brevity: 0.2}`; no trainer code changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collab_megatron.errors import UserError
from collab_megatron.rewards.accuracy import ExactAccuracy, JudgedAccuracy
from collab_megatron.rewards.interactivity import Interactivity
from collab_megatron.rewards.scorer import Scorer
from collab_megatron.rewards.token_amount import TokenAmount
from collab_megatron.types import ChatLLM, Metric


@dataclass(frozen=True)
class MetricContext:
    """What a metric may be made of."""

    judge: ChatLLM | None  # None: no judge is configured
    accuracy_verifier: str = "judge"  # exact | judge
    judge_prompt_file: Path | None = None  # replaces the interactivity prompt
    accuracy_prompt_file: Path | None = None  # replaces the prompt of accuracy's judge

    def need_judge(self, metric: str) -> ChatLLM:
        """The judge. Raises UserError naming the metric that cannot do without."""
        if self.judge is None:
            raise UserError(f"metric {metric} needs an LLM judge: set simulators.judge")
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
    judge_prompt_file: Path | None = None,
    accuracy_prompt_file: Path | None = None,
    metric_modules: Sequence[str] = (),
) -> Scorer:
    """The scorer of a run. `metric_modules` are imported first, so that they may register metrics.

    Raises UserError for a module that cannot be imported, an unknown metric, or one that lacks its judge.
    """
    for module in metric_modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"reward.metric_modules: {module} cannot be imported ({error})") from None
    context = MetricContext(judge, accuracy_verifier, judge_prompt_file, accuracy_prompt_file)
    unknown = sorted(set(metric_weights) - set(_FACTORIES))
    if unknown:
        raise UserError(f"unknown metric {unknown[0]!r}; known are {', '.join(known_metrics())}")
    return Scorer([_FACTORIES[name](context) for name in metric_weights], metric_weights)


@register_metric("accuracy")
def _accuracy(context: MetricContext) -> Metric:
    if context.accuracy_verifier == "exact":
        return ExactAccuracy()
    return JudgedAccuracy(context.need_judge("accuracy"), context.accuracy_prompt_file)


@register_metric("interactivity")
def _interactivity(context: MetricContext) -> Metric:
    return Interactivity(context.need_judge("interactivity"), context.judge_prompt_file)


@register_metric("token_amount")
def _token_amount(context: MetricContext) -> Metric:
    return TokenAmount()
