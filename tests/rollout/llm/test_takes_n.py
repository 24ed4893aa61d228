"""Whether several answers can be asked for in one request is decided by what LiteLLM knows of every provider."""

from __future__ import annotations

import pytest

from collab_megatron.config.sections import DeploymentSection, UserSection
from collab_megatron.rollout.llm import Gateway

LOCAL = {"api_base": "http://127.0.0.1:9/v1", "api_key_env": None}


@pytest.mark.parametrize(
    ("section", "together"),
    [
        (UserSection(model="hosted_vllm/m", **LOCAL), True),
        (UserSection(model="openai/m", **LOCAL), True),
        (UserSection(model="anthropic/claude-3-5-haiku-20241022", api_key_env=None), False),
        (UserSection(model="hosted_vllm/m", first_turns_together=False, **LOCAL), False),
        (UserSection(model="anthropic/m", first_turns_together=True, api_key_env=None), True),
        (
            UserSection(
                model="hosted_vllm/m", deployments=(DeploymentSection(model="anthropic/m", api_key_env=None),), **LOCAL
            ),
            False,
        ),
    ],
)
def test_all_deployments_must_take_n(section: UserSection, together: bool) -> None:
    assert Gateway({"user": section}, 1).together("user", 0) == together


def test_each_simulator_of_a_mixture_by_itself() -> None:
    other = UserSection(model="anthropic/m", api_key_env=None)
    gateway = Gateway({"user": UserSection(model="hosted_vllm/m", mixture=(other,), **LOCAL)}, 1)
    assert [gateway.together("user", part) for part in (0, 1)] == [True, False]
