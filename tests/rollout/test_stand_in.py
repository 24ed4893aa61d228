"""The stand-in speaks as the clients of engine and LLMs want it, always says the same, and counts."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from collab_megatron.config.sections import LLMSection, UserSection
from collab_megatron.data.chat import ChatTemplate
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.engine.client import EngineClient, open_session
from collab_megatron.rollout.llm import Gateway, LLMUserSimulator
from collab_megatron.rollout.rewards.accuracy import JudgedAccuracy
from collab_megatron.rollout.rewards.interactivity import Interactivity
from collab_megatron.types import TERMINATION_SIGNAL, Generation, Message, ScoredConversation
from tests.rollout.fakes import TASK
from tests.rollout.runs import counts, set_version, stand_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate(build_tokenizer())


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with stand_in(tmp_path, latency_ms=1) as url:
        yield url


async def test_policy_turns_are_words_and_depend_on_the_context_alone(url: str, chat: ChatTemplate) -> None:
    ids = chat.prompt_ids(TASK.prompt)
    async with open_session() as session:
        client = EngineClient(session, url, stop_token_ids=chat.end_ids, timeout_s=10, max_concurrency=64)

        async def ask(input_ids: list[int], n: int = 1, limit: int = 64, cache_key: str = "0") -> list[Generation]:
            return await client.generate(input_ids, n=n, temperature=1.0, max_new_tokens=limit, cache_key=cache_key)

        replies = await ask(ids, n=4)
        assert len({reply.token_ids_T for reply in replies}) == 4
        for reply in replies:
            assert chat.ended(reply.token_ids_T)
            assert reply.finish_reason == "stop"
            assert set(reply.versions_T) == {0}
            assert all(logprob <= 0 for logprob in reply.logprobs_T)
            assert len(chat.reply_text(reply.token_ids_T).split()) == len(reply.token_ids_T) - 1 >= 2
        assert await ask(ids, n=4) == replies
        assert await ask([*ids, 7], n=4) != replies
        (cut,) = await ask(ids, limit=2)
        assert (len(cut.token_ids_T), cut.finish_reason) == (2, "length")

        set_version(url, 6)
        assert await client.weight_version(timeout_s=10) == 6
        newer = await ask(ids, n=4, cache_key="6")
        assert [reply.token_ids_T for reply in newer] == [reply.token_ids_T for reply in replies]
        assert {version for reply in newer for version in reply.versions_T} == {6}
    said = counts(url)
    assert (said["turns"], said["turns_repeated"], said["paid"]) == (5, 1, 0)


async def test_user_and_judges_get_what_their_prompts_want(url: str) -> None:
    roles = {
        name: LLMSection(model=f"hosted_vllm/{name}", api_base=f"{url}/v1", api_key_env=None)
        for name in ("user", "judge")
    }
    gateway = Gateway(roles, seed=1)
    user, judge = LLMUserSimulator(UserSection(model="user"), gateway.role("user")), gateway.role("judge")
    messages = (*TASK.prompt, Message("assistant", "when?"))
    turns = await asyncio.gather(*(user.reply(TASK, messages, sample_index=i) for i in range(40)))
    assert len(set(turns)) > 30
    assert 0 < sum(TERMINATION_SIGNAL in text for text in turns) < 20
    conversation = ScoredConversation(TASK, messages, len(TASK.prompt), 1)
    assert 0 <= await Interactivity(judge).score(conversation) <= 1
    assert await JudgedAccuracy(judge).score(conversation) in (0, 1)
    said = counts(url)
    assert (said["paid"], said["repeated"], said["repeats"]) == (42, 0, [])
    again = await user.reply(TASK, messages, sample_index=3)
    await gateway.close()
    assert again == turns[3]
    said = counts(url)
    assert (said["paid"], said["repeated"]) == (43, 1)
    ((sent_at, came_at),) = said["repeats"]
    assert sent_at < came_at < sent_at + 60


def test_a_client_that_is_gone_before_its_answer_is_not_counted(tmp_path: Path) -> None:
    """Its request may be made again without being one too many."""
    body = b'{"model": "user", "messages": [{"role": "user", "content": "hello"}], "seed": 1}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with stand_in(tmp_path, latency_ms=250) as url:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(head + body)
        time.sleep(0.6)
        assert counts(url)["paid"] == 0
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, trust_env=False)
        assert answer.json()["choices"]
        assert (counts(url)["paid"], counts(url)["repeated"]) == (1, 0)
