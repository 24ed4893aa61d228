"""Calls that are cancelled, as all are when a run fails or is interrupted, leave no warnings in its report."""

from __future__ import annotations

import subprocess
import sys

import pytest

CANCELS = """
import asyncio, gc, time
from collab_megatron.config.sections import LLMSection
from collab_megatron.rollout.llm.litellm_api import ApiRequest, Endpoint, LiteLLMApi
from collab_megatron.types import LLMRequest, Message

async def main():
    api = LiteLLMApi()
    section = LLMSection(model="hosted_vllm/x", api_base="http://127.0.0.1:9/v1", max_tokens=5)
    endpoint = Endpoint(section, None, None, False)
    request = ApiRequest(LLMRequest([Message("user", "a")], str), section, n=1, seed=1, temperature=1.0)
    for turns in range(1, 40):
        task = asyncio.create_task(api.chat(endpoint, request, 5.0))
        for _ in range(turns):
            await asyncio.sleep(0)
        if turns % 2:
            time.sleep(0.005)  # LiteLLM's thread ends before the cancel
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await api.close()

async def forgotten():
    pass

asyncio.run(main())
gc.collect()
forgotten()
"""


@pytest.mark.slow
def test_a_call_cancelled_at_any_moment_leaves_no_coroutine_behind() -> None:
    done = subprocess.run([sys.executable, "-c", CANCELS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "never awaited" in line] == [
        "<string>:27: RuntimeWarning: coroutine 'forgotten' was never awaited"  # our own are still reported
    ]
