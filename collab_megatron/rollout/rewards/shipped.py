"""Factories of the shipped metrics. Importing this module registers them."""

from __future__ import annotations

from collab_megatron.rollout.rewards.accuracy import ExactAccuracy, JudgedAccuracy, RuledAccuracy
from collab_megatron.rollout.rewards.bleu_score import BleuScore
from collab_megatron.rollout.rewards.interactivity import Interactivity
from collab_megatron.rollout.rewards.math_checker import MathChecker
from collab_megatron.rollout.rewards.pass_rate import PassRate, PassRateSettings
from collab_megatron.rollout.rewards.registry import MetricContext, register_metric
from collab_megatron.rollout.rewards.rubric import RubricJudge, RubricSettings
from collab_megatron.rollout.rewards.token_amount import TokenAmount, TokenAmountSettings
from collab_megatron.rollout.rewards.turn_count import TurnCount, TurnCountSettings
from collab_megatron.types import Metric


@register_metric("accuracy")
def accuracy(context: MetricContext) -> Metric:
    if context.accuracy_verifier == "exact":
        return ExactAccuracy()
    judged = JudgedAccuracy(context.need_judge("accuracy"), context.prompt_file)
    return RuledAccuracy(judged, MathChecker()) if context.accuracy_verifier == "rules" else judged


@register_metric("bleu_score")
def bleu_score(context: MetricContext) -> Metric:
    return BleuScore(context.extractor("document"))


@register_metric("interactivity")
def interactivity(context: MetricContext) -> Metric:
    return Interactivity(context.need_judge("interactivity"), context.prompt_file, sees=context.interactivity_sees)


@register_metric("judge")
def judge(context: MetricContext) -> Metric:
    return RubricJudge(context.need_judge("judge"), context.settings(RubricSettings), context.prompt_file)


@register_metric("pass_rate")
def pass_rate(context: MetricContext) -> Metric:
    return PassRate(context.extractor("code"), context.settings(PassRateSettings), here=context.here)


@register_metric("token_amount")
def token_amount(context: MetricContext) -> Metric:
    return TokenAmount(context.settings(TokenAmountSettings))


@register_metric("turn_count")
def turn_count(context: MetricContext) -> Metric:
    return TurnCount(context.settings(TurnCountSettings))
