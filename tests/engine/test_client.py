"""The engine client: parsing, failures, and the real server against transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from collab_megatron.engine.client import (
    UNPUBLISHED,
    EngineClient,
    EngineGone,
    EngineSilent,
    open_session,
    parse_generation,
)
from collab_megatron.engine.control import BucketTensors, EngineControl
from collab_megatron.errors import RunError
from collab_megatron.launch.ports import free_port
from tests.conftest import Server

PROMPTS = ([3, 40, 41, 42, 2, 4], [3, 50, 51, 2, 4], [3, 60, 2, 4, 70, 71, 2, 3, 80, 2, 4])


def item(**changes: object) -> dict:
    meta = {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-0.1, 5, None], [-0.2, 2, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        "cached_tokens": 1,
    }
    return {"output_ids": [5, 2], "meta_info": {**meta, **changes}}


def test_every_token_carries_the_version_that_sampled_it() -> None:
    generation = parse_generation(item())
    assert generation.token_ids_T == (5, 2)
    assert generation.versions_T == (3, 4)
    assert generation.logprobs_T == (-0.1, -0.2)


def test_weights_nobody_published_are_version_minus_one() -> None:
    assert parse_generation(item(weight_versions=None, weight_version="default")).versions_T == (-1, -1)


def test_an_aborted_generation_is_an_error_not_a_reply() -> None:
    with pytest.raises(RunError, match="abort"):
        parse_generation(item(finish_reason={"type": "abort", "message": "paused"}))


def test_missing_logprobs_are_an_error() -> None:
    with pytest.raises(RunError, match="2 tokens with 1"):
        parse_generation(item(output_token_logprobs=[[-0.1, 5, None]]))


async def test_a_refused_a_silent_and_a_missing_engine_are_named() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": "no room"}, status=503)

    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    app = web.Application()
    app.router.add_post("/generate", refuse)
    app.router.add_get("/model_info", hang)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    url = f"http://127.0.0.1:{port}"
    async with open_session() as session:
        client = EngineClient(session, url, stop_token_ids=[2], timeout_s=5, max_concurrency=2)
        with pytest.raises(RunError, match=rf"{url} refused .*503.*no room"):
            await client.generate([1], n=1, temperature=1.0, max_new_tokens=1)
        with pytest.raises(EngineSilent, match=rf"{url} did not answer model_info within 0.2 s"):
            await client.weight_version(timeout_s=0.2)
        await runner.cleanup()
        with pytest.raises(EngineGone, match=f"{url} is gone"):
            await client.generate([1], n=1, temperature=1.0, max_new_tokens=1)


@pytest.mark.slow
async def test_the_real_server_generates_what_transformers_does(tiny_engine: Server, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    async with open_session() as session:
        client = EngineClient(session, tiny_engine.url, stop_token_ids=[2], timeout_s=60, max_concurrency=8)
        assert await client.weight_version(timeout_s=10) == UNPUBLISHED
        for prompt in PROMPTS:
            (greedy,) = await client.generate(prompt, n=1, temperature=0.0, max_new_tokens=12)
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2
            )
            assert list(greedy.token_ids_T) == expected[0, len(prompt) :].tolist()
            sampled = []
            for temperature in (0.7, 1.0, 1.3):
                several = await client.generate(prompt, n=4, temperature=temperature, max_new_tokens=12)
                assert len(several) == 4
                sampled += [(temperature, generation) for generation in several]
            for temperature, generation in sampled:
                ids = torch.tensor([[*prompt, *generation.token_ids_T]])
                with torch.no_grad():
                    logprobs = torch.log_softmax(model(ids).logits[0].float() / temperature, -1)
                at = range(len(prompt) - 1, ids.shape[1] - 1)
                own = [logprobs[t, ids[0, t + 1]].item() for t in at]
                assert list(generation.logprobs_T) == pytest.approx(own, abs=1e-4)


@pytest.mark.slow
def test_control_calls_of_the_real_server(tiny_engine: Server) -> None:
    control = EngineControl(tiny_engine.url, timeout_s=30)
    assert control.weight_version() == "default"
    control.pause()
    control.resume()
    ids, logprobs = control.greedy(PROMPTS[0], max_new_tokens=3, stop_token_ids=[])
    assert len(ids) == 3
    assert len(logprobs) == 3
    assert max(logprobs) < 0
    with pytest.raises(RunError, match="refused update_weights_from_distributed"):
        control.receive_bucket(
            BucketTensors(names=[], dtypes=[], shapes=[]), group_name="none", packed=True, weight_version=None
        )
    control.close()


def test_an_engine_that_never_answers_is_given_up_at_the_deadline() -> None:
    control = EngineControl(f"http://127.0.0.1:{free_port()}", timeout_s=1)
    with pytest.raises(RunError, match=r"not ready within 0.5 s"):
        control.wait_until_ready(timeout_s=0.5)
    with pytest.raises(RunError, match="died while starting"):
        control.wait_until_ready(timeout_s=5, alive=lambda: False)
    control.close()
