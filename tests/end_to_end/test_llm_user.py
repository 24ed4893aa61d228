"""A real language model plays the user: SmolLM2-135M behind SGLang's OpenAI-compatible address, by way of LiteLLM.

It is a poor user. That this is seen is the point; the checks look at the form of its turns, not at their sense.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from collab_megatron.config import EvaluateConfig
from collab_megatron.config.sections import (
    DataSection,
    EngineSection,
    HealthSection,
    ModelSection,
    RewardSection,
    RolloutSection,
    RunSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.data.parquet import read_tasks, write_tasks
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import engine_command
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.rollout.clients import open_clients
from collab_megatron.rollout.group import TreeId, play_once
from collab_megatron.rollout.llm import RoleUsage
from collab_megatron.rollout.llm.health import CHECKS, MALFORMED, verdict
from collab_megatron.types import Message, Reply, RolloutStatus, Task
from tests.end_to_end.test_smollm2 import smollm2

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.timeout(300)]

REQUESTS = {
    "table": ("Can you book a table for me?", "Book a table for four people at noon on Friday in the name of Judy."),
    "mail": ("Write a mail to my landlord.", "Write a mail of three sentences to my landlord: the heating is broken."),
    "sum": ("I need to add some numbers.", "What is the sum of 12, 30 and 7? Give the number alone."),
    "trip": ("Help me to plan a trip.", "Plan one day in Paris for two people who like paintings and hate crowds."),
}
SERVED = "smollm2"
ResponseFormat = Literal["json_object", "json_schema"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2(tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for both: the policy's token ids and the user's chat."""
    settings = EngineSection(
        max_total_tokens=16384,
        max_running_requests=16,
        context_length=2048,
        threads=2,
        extra_args=("--served-model-name", SERVED),
    )
    command = engine_command(settings, model_path=str(model), dtype="float32", device="cpu", port=free_port(), seed=1)
    argv = [word for word in command.argv if word != "--skip-tokenizer-init"]  # a chat needs the tokenizer
    with Supervisor(tmp_path_factory.mktemp("logs")) as supervisor:
        child = supervisor.start("engine", argv, command.env)
        control = EngineControl(command.url, timeout_s=120)
        control.wait_until_ready(timeout_s=120, alive=lambda: child.process.poll() is None)
        control.close()
        yield command.url


def config_for(folder: Path, model: Path, url: str, response_format: ResponseFormat) -> EvaluateConfig:
    tasks = [
        Task(name, (Message("user", opening),), request, "none", metadata={"ambiguous": True})
        for name, (opening, request) in REQUESTS.items()
    ]
    write_tasks(folder / "validation.parquet", tasks)
    user = UserSection(
        model=f"hosted_vllm/{SERVED}",
        api_base=f"{url}/v1",
        api_key_env=None,
        max_tokens=96,
        timeout_s=60,
        deadline_s=120,
        max_attempts=3,
        response_format=response_format,
    )
    return EvaluateConfig(
        run=RunSection(dir=folder),
        model=ModelSection(path=str(model)),
        data=DataSection(train=folder / "validation.parquet", validation=folder / "validation.parquet"),
        simulators=SimulatorsSection(user=user),
        reward=RewardSection(metric_weights={"accuracy": 1.0, "token_amount": -0.1}, accuracy_verifier="exact"),
        rollout=RolloutSection(
            max_user_turns=1, max_assistant_turns=2, max_new_tokens=48, inexact_template="as_sampled"
        ),
    )


async def play(config: EvaluateConfig, url: str) -> tuple[dict[str, float], RoleUsage, list[Reply]]:
    """Health figures, the user's counters, the conversations."""
    async with open_clients(config, engine_urls=[url], max_context_tokens=2048) as clients:
        tasks = read_tasks(config.data.validation_files[0])
        await clients.gateway.check_reachable()
        async with asyncio.timeout(200):
            replies = await asyncio.gather(
                *(
                    play_once(task, TreeId(0, slot, first_sample=slot), limits=clients.limits, players=clients.players)
                    for slot, task in enumerate(tasks)
                )
            )
        return clients.health.metrics(), clients.gateway.snapshot().roles["user"], replies


@pytest.mark.parametrize("response_format", ["json_object", "json_schema"])
def test_a_poor_user_plays_and_is_seen(
    server: str, model: Path, tmp_path: Path, response_format: ResponseFormat
) -> None:
    config = config_for(tmp_path, model, server, response_format)
    health, usage, replies = asyncio.run(play(config, server))
    counts = Counter({name.removeprefix("health/user/"): int(count) for name, count in health.items()})
    futures = [reply.futures_K[0] for reply in replies]
    turns = [message.content for future in futures for message in future.messages if message.role == "user"]
    warnings, stop = verdict(health, HealthSection(min_replies=1))
    print(*(f"{name:20s} {count}" for name, count in counts.items()), *warnings, *turns, sep="\n")

    # the server is well, so every request was answered; every answer is a turn or counted as unusable
    assert usage.answers == usage.attempts == counts["replies"] > 0
    assert usage.prompt_tokens > usage.completion_tokens > 0
    malformed = sum(counts[name] for name in MALFORMED)
    assert counts["turns"] + malformed == counts["replies"]
    assert malformed == usage.malformed
    assert counts["turns"] == len(turns)
    failed = [future for future in futures if not future.status.scored]
    assert {future.status for future in failed} <= {RolloutStatus.SIMULATOR_FAILED}
    assert len(failed) == usage.failures
    assert all(reply.mr is None for reply in replies if reply.futures_K[0] in failed)
    assert counts["model_changed"] == counts["fingerprint_changed"] == 0
    assert stop is None
    if response_format == "json_schema":
        assert turns, "the server sees to it that the fields are there"
    # 135 M parameters: most replies are poor, but now and then one is well formed
    poor = {name for name, check in CHECKS.items() if counts[name] and check.warn is not None}
    assert {name for name in CHECKS if any(f"({name}:" in warning for warning in warnings)} == poor
