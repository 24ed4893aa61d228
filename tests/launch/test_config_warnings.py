"""Warnings about metrics: units of length, extractions that are cut off, programs without isolation; in builds too."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import BuildDatasetConfig
from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.launch.config_warnings import metric_warnings
from collab_megatron.launch.preflight import check_build

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


@pytest.fixture
def service() -> Iterator[str]:
    """An address that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize(
    ("weights", "judge_tokens", "words"),
    [
        ({"accuracy": 1.0, "token_amount": -0.0001}, 1024, "token_amount=-0.0001 is per kilotokens"),
        ({"bleu_score": 1.0}, 1024, "simulators.judge.max_tokens=1024 is below simulators.assistant.max_tokens=2048"),
        ({"bleu_score": 1.0, "token_amount": -0.1}, 2048, ""),
    ],
)
def test_a_build_warns_of_its_metrics(
    weights: dict[str, float],
    judge_tokens: int,
    words: str,
    service: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"single_turn_prompt": "book a room", "single_turn_completion": "book"}))
    llm = LLM | {"model": "hosted_vllm/m", "api_base": service, "input_usd_per_mtoken": 0, "output_usd_per_mtoken": 0}
    players = {"user": llm, "judge": llm | {"max_tokens": judge_tokens}, "assistant": llm | {"max_tokens": 2048}}
    config = BuildDatasetConfig.read(
        {
            "problems": str(problems),
            "output": str(tmp_path / "built"),
            "simulators": players,
            "reward": {"metric_weights": weights},
        },
        "build",
    )
    with caplog.at_level(logging.WARNING):
        check_build(config, dry_run=True, report=lambda text: None)
    found = [record.getMessage() for record in caplog.records if record.name.startswith("collab_megatron")]
    assert len(found) == bool(words)
    assert all(words in sentence for sentence in found)
