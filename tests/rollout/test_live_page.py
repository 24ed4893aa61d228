"""The driver's live page over HTTP: who may read it, what it shows, and text that would like to be code."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from collab_megatron.errors import UserError
from collab_megatron.rollout.live_page import LivePage, key_of, page
from collab_megatron.wire.live_status import Status

STATUS = Status(
    run="rl",
    step=12,
    steps=40,
    phase="rollouts of step 12",
    phase_s=75.0,
    trees_running=16,
    calls_in_flight={"user": 5, "judge": 0},
    turns_waiting=3,
    engines_live=1,
    engines_lost={"http://127.0.0.1:1": "it does not answer"},
    seconds_per_step=9.0,
    eta_s=252.0,
    usd=1.5,
    calls=4321,
    figures={"reward/mr_mean": 1.75, "simulator/user/calls": 9.0},
    chat=(("user", "a table please"), ("assistant", "which day?")),
)


@asynccontextmanager
async def served(folder: Path, status: Status = STATUS) -> AsyncIterator[tuple[str, str]]:
    live = LivePage(lambda: status)
    url = await live.start(0, folder / "live.json")
    try:
        yield url, json.loads((folder / "live.json").read_text())["key"]
    finally:
        await live.close()


async def get(url: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url, headers=headers)


async def test_only_who_has_the_key_sees_anything(tmp_path: Path) -> None:
    async with served(tmp_path) as (url, key):
        assert url.startswith("http://127.0.0.1:")
        assert (tmp_path / "live.json").stat().st_mode & 0o777 == 0o600
        basic = base64.b64encode(f"me:{key}".encode()).decode()
        for path in ("/", "/status", "/metrics", "/nothing"):
            refused = [await get(url + path), await get(url + path, Authorization="Bearer wrong")]
            assert [(each.status_code, each.text) for each in refused] == [(401, "")] * 2
            assert refused[0].headers["WWW-Authenticate"].startswith("Basic")
            found = [await get(url + path, Authorization=f"{kind}") for kind in (f"Bearer {key}", f"Basic {basic}")]
            assert [each.status_code for each in found] == [404 if path == "/nothing" else 200] * 2
        async with httpx.AsyncClient(trust_env=False) as client:
            posted = await client.post(url + "/status", headers={"Authorization": f"Bearer {key}"})
        assert posted.status_code == 405


@pytest.mark.parametrize("header", ["", "Basic", "Basic !!!", "Basic YQ==", "Bearer", "Digest x", "Bearer é"])
def test_an_odd_header_is_no_key(header: str) -> None:
    assert key_of(header) in (b"", "é".encode())


async def test_status_and_metrics_have_the_same_numbers(tmp_path: Path) -> None:
    async with served(tmp_path) as (url, key):
        status = (await get(url + "/status", Authorization=f"Bearer {key}")).json()
        text = (await get(url + "/metrics", Authorization=f"Bearer {key}")).text
    assert (status["step"], status["eta_s"], status["calls_in_flight"]) == (12, 252.0, {"user": 5, "judge": 0})
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    assert found["collab_step"] == 12
    assert found["collab_calls_in_flight_user"] == 5
    assert found["collab_reward_mr_mean"] == 1.75
    assert found["collab_simulator_user_calls"] == 9


async def test_the_page_shows_the_run_and_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script>{step}%s" + "x" * 3000
    status = replace(STATUS, run="<b>", chat=(("user", hostile),), engines_lost={"u": "<img src=x onerror=alert(1)>"})
    async with served(tmp_path, status) as (url, key):
        answer = await get(url + "/", Authorization=f"Bearer {key}")
    for markup in ("<script", "<img", "<b>", "x" * 2001):
        assert markup not in answer.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{step}%s" in answer.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    shown = page(STATUS)
    for words in (
        "step 12 of 40",
        "rollouts of step 12, for 1m15s",
        "5 user",
        "4m12s",
        "4,321 LLM calls, $1.50",
        "1.75",
    ):
        assert words in shown
    assert "no batch yet" in page(replace(STATUS, chat=(), figures={}, eta_s=None, seconds_per_step=None))


async def test_a_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    async with served(tmp_path) as (url, _):
        with pytest.raises(UserError, match=r"driver\.live_port=\d+ cannot be used: Address already in use"):
            await LivePage(lambda: STATUS).start(int(url.rpartition(":")[2]), tmp_path / "other.json")
