"""tools/bench/driver.py: stand-ins, bound, and a small run with the real driver; no speeds."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from collab_megatron.engine.client import parse_generation
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.rollout.llm.user import read_user_turn
from collab_megatron.rollout.rewards.interactivity import read_marks
from tests.conftest import REPOSITORY, Run
from tools.bench.driver_loads import SMALL, Load, chains_s, lower_bound, same_calls
from tools.bench.driver_servers import SimulatorEndpoint

TOOL = "tools/bench/driver.py"
TOOL_S = 240.0
KEYS = {
    "futures",
    "wall_s",
    "lower_bound_s",
    "ratio",
    "recipe_wall_s",
    "failing_wall_s",
    "failing_recipe_wall_s",
    "async_speedup",
    "own_ms_per_turn",
    "litellm_ms_per_call",
    "two_shard_speedup",
}


@pytest.mark.slow
@pytest.mark.full
def test_a_small_run_against_the_real_driver(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "figures.json"
    done = run(TOOL, "--small", "--parts", "main", "recipe", "--json", str(output), timeout_s=TOOL_S)
    assert done.code == 0, done.output
    figures = json.loads(output.read_text())
    assert set(figures) >= KEYS
    conversations = SMALL.main.conversations
    assert figures["futures"] == figures["recipe_futures"] == figures["failing_recipe_futures"] == conversations
    assert figures["calls"] == 3 * conversations  # two user turns and a verdict each
    assert figures["same_calls"] is figures["failing_same_calls"] is True
    assert figures["failures"] > 0
    assert figures["ratio"] == pytest.approx(figures["wall_s"] / figures["lower_bound_s"])
    assert figures["lower_bound_s"] == max(figures["bounds"].values())
    assert figures["ratio"] >= 1
    assert figures["recipe_wall_s"] > figures["wall_s"]
    assert figures["failing_recipe_wall_s"] > SMALL.failure_wait_s
    assert figures["litellm_ms_per_call"] > 0
    assert figures["async_speedup"] is figures["two_shard_speedup"] is None


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--shards", "0"], "--shards"),
        (["--memory", "0"], "--memory"),
        (["--parts", "recipe"], "name both"),
        (["--parts", "pigeon"], "pigeon"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], says: str, run: Run) -> None:
    done = run(TOOL, *arguments)
    assert done.code == 2
    assert says in done.output


def endpoint(**changes: Any) -> SimulatorEndpoint:
    return SimulatorEndpoint(**{"seed": 1, "median_s": 2.0, "sigma": 0.8, "fail_share": 0.0, **changes})


def chat(text: str, seed: int, model: str = "user") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "seed": seed}


def text_of(reply: bytes | None) -> str:
    assert reply is not None
    text: str = json.loads(reply)["choices"][0]["message"]["content"]
    return text


def test_calls_are_the_same_whatever_seeds_a_flow_draws() -> None:
    left, right = endpoint(), endpoint()
    drawn = [left.plan(chat("hello", seed)).call for seed in (7, 8, 7)]
    others = [right.plan(chat("hello", seed)).call for seed in (1001, 5, 1001)]
    assert drawn == others
    assert drawn[0] == drawn[2] != drawn[1]  # the same request again is the same call
    assert endpoint(seed=2).plan(chat("hello", 7)).call.latency_s != drawn[0].latency_s


def test_replies_are_what_the_readers_want_and_link_the_calls() -> None:
    api = endpoint()
    first = api.plan(chat("hello", 1))
    said = read_user_turn(text_of(first.reply))
    second = api.plan(chat(f'{{"role": "user", "content": "{said}"}}', 1))
    verdict = api.plan(chat(f"{said}\n{read_user_turn(text_of(second.reply))}", 1, model="hosted/judge"))
    assert 0 <= read_marks(text_of(verdict.reply)) <= 1
    assert [plan.call.role for plan in (first, second, verdict)] == ["user", "user", "judge"]
    assert first.call.parent == ""
    assert second.call.parent == first.call.name
    assert verdict.call.parent == second.call.name


def test_latencies_are_lognormal() -> None:
    api = endpoint()
    drawn = sorted(api.plan(chat(f"number {i}", 1)).call.latency_s for i in range(2000))
    assert drawn[1000] == pytest.approx(2.0, rel=0.1)
    assert drawn[int(2000 * 0.8413)] == pytest.approx(2.0 * 2.2255, rel=0.1)  # e ** 0.8, one sigma above


def test_a_failing_call_fails_once() -> None:
    api = endpoint(fail_share=0.25)
    bodies = [chat(f"number {i}", 1) for i in range(400)]
    failed = [body for body in bodies if api.plan(body).reply is None]
    assert api.failures == len(failed) == pytest.approx(100, abs=40)
    assert all(api.plan(body).reply is not None for body in failed)


CALLS = [
    {"role": "user", "name": "a", "parent": "", "latency_s": 3.0},
    {"role": "user", "name": "b", "parent": "a", "latency_s": 4.0},
    {"role": "judge", "name": "c", "parent": "b", "latency_s": 5.0},
    {"role": "user", "name": "d", "parent": "", "latency_s": 7.0},
    {"role": "judge", "name": "e", "parent": "d", "latency_s": 1.0},
]


def test_the_bound_is_the_largest_of_four() -> None:
    assert sorted(chains_s(CALLS, turn_s=0.5)) == [7 + 1 + 2 * 0.5, 3 + 4 + 5 + 3 * 0.5]

    def bound(**changes: Any) -> float:
        limits: dict[str, Any] = {"turn_s": 0.5, "capacity": 1e9, "litellm_ms": 1.0, "processes": 1}
        limits["concurrency"] = {"user": 100, "judge": 100}
        return lower_bound({"calls": CALLS, "engine": {"tokens": 200}}, **limits | changes).seconds

    assert bound() == 13.5
    assert bound(capacity=10.0) == 20
    assert bound(concurrency={"user": 1, "judge": 1}) == 14  # the user simulator's calls one by one
    assert bound(litellm_ms=10_000.0) == 50
    assert bound(litellm_ms=10_000.0, processes=2) == 25


def test_same_calls_looks_at_their_names() -> None:
    assert same_calls({"calls": CALLS}, {"calls": CALLS[::-1]})
    assert not same_calls({"calls": CALLS}, {"calls": CALLS[1:]})


def test_turns_of_a_step_are_counted() -> None:
    load = Load(2, 3, 4, median_s=1.0)
    assert load.conversations == 24
    assert load.turns == 6 + 24 * (2 + 2 + 1)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    ready = tmp_path_factory.mktemp("stand_ins") / "address"
    with Supervisor(ready.parent / "logs") as supervisor:
        argv = [sys.executable, "-m", "tools.bench.driver_servers", "--ready-file", str(ready)]
        child = supervisor.start("stand-ins", argv, {"PYTHONPATH": str(REPOSITORY)})
        url = supervisor.wait_for_file(ready, child, timeout_s=60)
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            yield client


def generate(client: httpx.Client, context: list[int], n: int) -> list[dict[str, Any]]:
    body = {"input_ids": context, "sampling_params": {"n": n}}
    items: list[dict[str, Any]] = client.post("/generate", json=body).json()
    return items


def test_the_engine_speaks_sglang_and_depends_on_the_context(stand_ins: httpx.Client) -> None:
    stand_ins.post("/settings", json={"reply_tokens": 10, "version": 3})
    replies = [parse_generation(item) for item in generate(stand_ins, [4, 5, 6], 2)]
    assert [len(reply.token_ids_T) for reply in replies] == [10, 10]
    assert replies[0].token_ids_T != replies[1].token_ids_T
    assert set(replies[0].versions_T) == {3}
    assert [parse_generation(item) for item in generate(stand_ins, [4, 5, 6], 2)] == replies
    assert parse_generation(generate(stand_ins, [4, 5, 7], 1)[0]).token_ids_T != replies[0].token_ids_T
    stand_ins.post("/version", json={"version": 4})
    assert parse_generation(generate(stand_ins, [4, 5, 6], 1)[0]).token_ids_T != replies[0].token_ids_T
    assert stand_ins.get("/model_info").json() == {"weight_version": "4"}
    assert stand_ins.get("/trace").json()["engine"] == {"requests": 4, "sequences": 6, "tokens": 60}


@pytest.mark.slow
def test_the_engine_serves_at_its_rate(stand_ins: httpx.Client) -> None:
    stand_ins.post("/settings", json={"reply_tokens": 20, "capacity": 200.0, "sequence_rate": 100.0})

    def seconds(n: int) -> float:
        start = time.monotonic()
        generate(stand_ins, [n], n)
        return time.monotonic() - start

    assert 0.2 <= seconds(1) < 2  # the rate of one sequence
    assert 0.4 <= seconds(4) < 2  # four share the capacity
    ended = []
    threads = [threading.Thread(target=lambda: ended.append(seconds(2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # two requests share it as one of twice the size does, 0.4 s for both; the first is alone until the other begins
    assert min(ended) >= 0.3


def test_the_endpoint_answers_after_the_latency_and_keeps_the_trace(stand_ins: httpx.Client) -> None:
    stand_ins.post("/settings", json={"median_s": 0.2, "sigma": 0.0, "fail_share": 0.0})
    start = time.monotonic()
    reply = stand_ins.post("/v1/chat/completions", json=chat("hello", 1))
    assert time.monotonic() - start >= 0.2
    assert read_user_turn(reply.json()["choices"][0]["message"]["content"])
    trace = stand_ins.get("/trace").json()
    assert [(call["role"], call["latency_s"]) for call in trace["calls"]] == [("user", 0.2)]
    stand_ins.post("/settings", json={"fail_share": 1.0})
    asked = [stand_ins.post("/v1/chat/completions", json=chat("hello", 1)).status_code for _ in range(2)]
    assert asked == [500, 200]
    assert stand_ins.get("/nothing").status_code == 404
