"""The assistant of a dataset build that SGLang serves: its config, its servers' command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import BuildDatasetConfig
from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import engine_command
from collab_megatron.launch.build_engine import served_assistant
from collab_megatron.launch.plan import build_plan
from tests.rollout.fakes import TASK

LLM = {"model": "hosted_vllm/x", "api_key_env": None}


def config(**assistant: Any) -> BuildDatasetConfig:
    return BuildDatasetConfig.model_validate(
        {
            "problems": "p.jsonl",
            "output": "out",
            "model": {"path": "models/mine"},
            "simulators": {"user": LLM, "judge": LLM, "assistant": assistant},
        }
    )


def test_the_served_model_is_the_assistant() -> None:
    given = config(temperature=0.7, max_tokens=300)
    before = given.simulators.assistant
    assert before is not None
    assert (before.model, before.temperature, before.max_tokens) == ("hosted_vllm/models/mine", 0.7, 300)
    assert given.counting_tokenizer == "models/mine"
    assert given.run.logs_dir == Path("out/logs/build")
    after = served_assistant(given, ["http://127.0.0.1:1", "http://127.0.0.1:2/"], "A_KEY").simulators.assistant
    assert after is not None
    ways = [after, *after.deployments]
    assert [way.api_base for way in ways] == ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]
    assert {way.model for way in ways} == {"hosted_vllm/models/mine"}
    assert {way.api_key_env for way in ways} == {"A_KEY"}
    assert {way.input_usd_per_mtoken for way in ways} == {0}
    assert after.temperature == 0.7
    assert "SGLang serves models/mine" in build_plan(given, [TASK], [])


@pytest.mark.parametrize("twice", [{"model": "gpt-4o-mini"}, {"api_base": "http://127.0.0.1:1/v1"}])
def test_two_assistants_are_refused(twice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"simulators\.assistant\.{next(iter(twice))} names another"):
        config(**twice)


def test_only_a_server_that_chats_has_a_tokenizer() -> None:
    common: dict[str, Any] = {"model_path": "m", "dtype": "float32", "device": "cpu", "port": 1, "seed": 1}
    assert "--skip-tokenizer-init" in engine_command(EngineSection(), **common).argv
    assert "--skip-tokenizer-init" not in engine_command(EngineSection(), text=True, **common).argv
