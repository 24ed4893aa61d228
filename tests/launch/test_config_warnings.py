"""Warnings about metrics: units of length, extractions that are cut off, programs without isolation."""

from __future__ import annotations

from typing import Any

import pytest

from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.launch.config_warnings import metric_warnings

LLM = {"model": "m", "api_key_env": None}


def warnings(weights: dict[str, float], *, roles: dict[str, Any] | None = None, **reward: Any) -> list[str]:
    section = RewardSection(metric_weights=weights, **reward)
    simulators = SimulatorsSection.read({"user": LLM, "judge": LLM, "roles": roles or {}}, "simulators")
    return list(metric_warnings(section, simulators, reply_tokens=2048))


@pytest.mark.parametrize(
    ("weight", "unit", "words"),
    [
        (-0.0001, "kilotokens", "=-0.0001 is per kilotokens, so 1,000 tokens change the reward by only 0.0001"),
        (-0.0001, "words", ""),  # the verl recipe
        (-0.0001, "tokens", ""),  # the paper, on documents
        (-0.0005, "tokens", ""),  # and on code and mathematics
        (-0.1, "kilotokens", ""),
        (-0.1, "tokens", "token_amount=-0.1 is per tokens, so a conversation of 10 tokens reaches the clamp"),
        (-0.1, "words", "a conversation of 13.3 tokens reaches the clamp"),
        (0.0, "tokens", ""),
    ],
)
def test_a_weight_of_another_unit_is_noticed(weight: float, unit: str, words: str) -> None:
    found = warnings({"token_amount": weight}, settings={"token_amount": {"unit": unit}})
    assert len(found) == bool(words)
    if words:
        assert words in found[0]
        assert "unit is one of tokens, kilotokens, words" in found[0]


def test_the_clamps_setting_counts() -> None:
    settings = {"token_amount": {"unit": "tokens"}}
    assert len(warnings({"token_amount": -0.1}, settings=settings, metric_clamps={"token_amount": 20.0})) == 1
    assert warnings({"token_amount": -0.1}, settings=settings, metric_clamps={"token_amount": 200.0}) == []
    assert warnings({"token_amount": -0.1}, settings=settings, metric_clamps={"token_amount": None}) == []


def test_an_extraction_needs_room_for_the_whole_result() -> None:
    (found,) = warnings({"bleu_score": 1.0, "accuracy": 1.0})
    assert found.startswith("simulators.judge.max_tokens=1024 is below rollout.max_new_tokens=2048")
    (found,) = warnings({"pass_rate": 1.0}, roles={"extractor": LLM | {"max_tokens": 2000}})
    assert found.startswith("simulators.roles.extractor.max_tokens=2000 is below")
    assert warnings({"pass_rate": 1.0}, roles={"extractor": LLM | {"max_tokens": 4096}}) == []


def test_programs_without_isolation_are_named() -> None:
    roomy = {"extractor": LLM | {"max_tokens": 4096}}
    (found,) = warnings({"pass_rate": 1.0}, roles=roomy, settings={"pass_rate": {"sandbox": "unsafe"}})
    assert "sandbox=unsafe: programs that the policy writes run with your rights" in found
    assert warnings({"accuracy": 1.0}, settings={"pass_rate": {"sandbox": "unsafe"}}) == []
