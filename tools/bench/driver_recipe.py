"""The recipe's control flow, stage by stage, for comparison in tools/bench/driver.py.

    python -m tools.bench.driver_recipe RESOLVED.yaml --url URL --settings FILE ... --failure-wait-s 60 --json FILE

- All replies are sampled before the first future begins.
- The futures of a reply are played one after another, those of different replies concurrently.
- The judges are called when all conversations have ended.
- A failed call is repeated after max(2**attempt, 60) s.

Same tasks, prompts, templates, engine, endpoint and limits of concurrency as the driver's; bare LiteLLM calls. The
wall time begins after imports and a warm-up tree without latencies, as the driver's does. One step for each file of
settings for the stand-ins.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop

from collab_megatron.config import RLConfig, load_config
from collab_megatron.config.sections import RolloutSection
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.parquet import read_task_files
from collab_megatron.errors import RunError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.rollout.llm import LLMUserSimulator
from collab_megatron.rollout.rewards.interactivity import Interactivity
from collab_megatron.signals import die_with_parent
from collab_megatron.types import Message, ScoredConversation, Task
from tools.bench.driver_litellm import BareLLM, load_litellm


@dataclass(frozen=True)
class RecipeClients:
    """The clients of a conversation."""

    session: aiohttp.ClientSession
    url: str
    chat: ChatTemplate
    user: LLMUserSimulator
    judge: Interactivity

    async def generate(self, context: Sequence[int], n: int, rollout: RolloutSection) -> list[list[int]]:
        """n replies as token ids. Raises RunError if the engine refuses."""
        sampling = {"temperature": rollout.temperature, "max_new_tokens": rollout.max_new_tokens, "n": n}
        body = orjson.dumps({"input_ids": list(context), "sampling_params": sampling, "return_logprob": True})
        async with self.session.post(f"{self.url}/generate", data=body) as response:
            payload = await response.read()
        if response.status != 200:
            raise RunError(f"the engine stand-in refused ({response.status})")
        return [item["output_ids"] for item in orjson.loads(payload)]


async def step(tasks: Sequence[Task], rollout: RolloutSection, clients: RecipeClients) -> int:
    """All trees of a step, stage by stage; returns the number of judged futures."""
    prompts = [clients.chat.prompt_ids(task.prompt) for task in tasks]
    replies = await asyncio.gather(*(clients.generate(ids, rollout.num_replies, rollout) for ids in prompts))
    played = await asyncio.gather(
        *(
            _futures_in_turn(task, [*prompt, *reply], number, rollout, clients)
            for task, prompt, group in zip(tasks, prompts, replies, strict=True)
            for number, reply in enumerate(group)
        )
    )
    conversations = [conversation for futures in played for conversation in futures]
    marks = await asyncio.gather(*(clients.judge.score(conversation) for conversation in conversations))
    return len(marks)


async def _futures_in_turn(
    task: Task, context: list[int], reply: int, rollout: RolloutSection, clients: RecipeClients
) -> list[ScoredConversation]:
    futures = rollout.first_futures
    return [await _play(task, context, reply * futures + k, rollout, clients) for k in range(futures)]


async def _play(
    task: Task, context: list[int], sample_index: int, rollout: RolloutSection, clients: RecipeClients
) -> ScoredConversation:
    prompt_length = len(clients.chat.prompt_ids(task.prompt))
    messages = [*task.prompt, Message("assistant", clients.chat.reply_text(context[prompt_length:]))]
    ids, tokens = list(context), len(context) - prompt_length
    for _ in range(min(rollout.max_user_turns, rollout.max_assistant_turns - 1)):
        text = await clients.user.reply(task, messages, sample_index=sample_index)
        messages.append(Message("user", text))
        ids += clients.chat.turn_glue(text)
        (turn,) = await clients.generate(ids, 1, rollout)
        ids += turn
        tokens += len(turn)
        messages.append(Message("assistant", clients.chat.reply_text(turn)))
    return ScoredConversation(task, tuple(messages), len(task.prompt), tokens, sample_index)


async def measure(config: RLConfig, url: str, settings: Sequence[bytes], failure_wait_s: float) -> list[dict[str, Any]]:
    """Play a step with each of the stand-ins' `settings`; returns times and traces."""
    assert config.simulators.judge is not None
    litellm = load_litellm()
    tasks = read_task_files(config.data.train_files)[0]
    user, judge = config.simulators.user, config.simulators.judge
    user_llm = BareLLM(litellm, url, "user", in_flight=user.max_concurrency, failure_wait_s=failure_wait_s)
    judge_llm = BareLLM(litellm, url, "judge", in_flight=judge.max_concurrency, failure_wait_s=failure_wait_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        chat = ChatTemplate(load_tokenizer(config.model.path))
        clients = RecipeClients(session, url, chat, LLMUserSimulator(user, user_llm), Interactivity(judge_llm))
        await step(read_task_files(config.data.validation_files)[0][:1], config.rollout, clients)
        gc.collect()
        gc.freeze()
        return [await _one_run(tasks, config.rollout, clients, load) for load in settings]


async def _one_run(
    tasks: Sequence[Task], rollout: RolloutSection, clients: RecipeClients, settings: bytes
) -> dict[str, Any]:
    async with clients.session.post(f"{clients.url}/settings", data=settings) as response:
        response.raise_for_status()
    start, cpu = time.monotonic(), time.process_time()
    futures = await step(tasks, rollout, clients)
    wall_s, cpu_s = time.monotonic() - start, time.process_time() - cpu
    async with clients.session.get(f"{clients.url}/trace") as response:
        trace = orjson.loads(await response.read())
    return {"wall_s": wall_s, "cpu_s": cpu_s, "futures": futures, "trace": trace}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.driver_recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--url", required=True, help="of tools/bench/driver_servers.py")
    parser.add_argument("--settings", type=Path, nargs="+", required=True, help="JSON for the stand-ins' /settings")
    parser.add_argument("--failure-wait-s", type=float, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    die_with_parent()
    config = load_config(RLConfig, args.config)
    settings = [file.read_bytes() for file in args.settings]
    publish_json(args.json, uvloop.run(measure(config, args.url, settings, args.failure_wait_s)))


if __name__ == "__main__":
    run_cli(main)
