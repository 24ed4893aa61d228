"""The endpoint as a process, over real HTTP, by urllib and by LiteLLM."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OPENING = "send me a taxi to the zoo"
KEY = "desk-secret"
DEADLINE_S = 30.0


def start(ready: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--ready-file", str(ready), *arguments]
    environment = {**os.environ, "DESK_API_KEY": "", **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(ready: Path, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while not ready.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, f"the endpoint was not ready within {DEADLINE_S} s"
        time.sleep(0.02)
    return ready.read_text()


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers") / "answered"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, answered: Path) -> Iterator[str]:
    ready = tmp_path_factory.mktemp("desk") / "address"
    process = start(ready, "--die-with-parent", "--answered", str(answered), DESK_API_KEY=KEY)
    try:
        yield wait_for(ready, process)
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def call(address: str, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, dict[str, Any]]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data=data)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_chat_completion_has_openais_shape(address):
    messages = [{"role": "user", "content": OPENING}]
    body = {"model": "desk-assistant", "messages": messages, "n": 3, "seed": 5, "temperature": 1.0}
    status, reply = call(address, "/v1/chat/completions", body)
    assert status == 200
    assert reply["object"] == "chat.completion"
    assert reply["system_fingerprint"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    contents = [choice["message"]["content"] for choice in reply["choices"]]
    words = sum(len(content.split()) for content in contents)
    assert reply["usage"] == {"prompt_tokens": 7, "completion_tokens": words, "total_tokens": 7 + words}
    again = call(address, "/v1/chat/completions", body)[1]
    assert [choice["message"]["content"] for choice in again["choices"]] == contents


def test_without_a_seed_samples_differ(address):
    body = {"model": "desk-assistant", "messages": [{"role": "user", "content": OPENING}]}
    replies = {call(address, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] for _ in range(20)}
    assert len(replies) > 1


def test_each_completion_is_counted_and_no_error(address, answered):
    def count(messages: list[dict[str, str]]) -> int:
        before = answered.stat().st_size if answered.exists() else 0
        call(address, "/v1/chat/completions", {"model": "desk-assistant", "messages": messages, "n": 2})
        return (answered.stat().st_size if answered.exists() else 0) - before

    assert count([{"role": "user", "content": OPENING}]) == 1
    assert count([]) == 0


def test_models_and_health(address):
    status, reply = call(address, "/v1/models")
    assert status == 200
    roles = ("user", "judge", "assistant")
    worlds = [f"{world}-{role}" for world in ("desk", "mini") for role in roles]
    assert {model["id"] for model in reply["data"]} == {*worlds, "desk-user-bare", "desk-user-terse"}
    assert call(address, "/health", key=None)[0] == 200


@pytest.mark.parametrize(
    ("body", "key", "status", "code"),
    [
        ({"model": "desk-user", "messages": []}, None, 401, "invalid_api_key"),
        ({"model": "desk-user", "messages": []}, "wrong", 401, "invalid_api_key"),
        ({"model": "desk-user", "messages": []}, KEY, 400, "invalid_request"),
        ({"model": "desk-assistant", "messages": [{"role": "user", "content": "hi"}]}, KEY, 400, "invalid_request"),
        ({"model": "gpt", "messages": []}, KEY, 404, "model_not_found"),
        (b"{", KEY, 400, "invalid_json"),
        ([], KEY, 400, "invalid_request"),
    ],
)
def test_errors_have_openais_shape(address, body, key, status, code):
    got, reply = call(address, "/v1/chat/completions", body, key)
    assert (got, reply["error"]["code"]) == (status, code)
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["message"]


def test_litellm_talks_to_it(address, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")

    async def complete(model: str, content: str, key: str = KEY) -> Any:
        return await litellm.acompletion(
            model=f"openai/{model}",
            messages=[{"role": "user", "content": content}],
            api_base=f"http://{address}/v1",
            api_key=key,
            seed=1,
            num_retries=0,
        )

    async def talk() -> None:
        reply = await complete("desk-assistant", OPENING)
        assert reply.choices[0].message.content
        with pytest.raises(litellm.BadRequestError, match="names none of"):
            await complete("desk-assistant", "hi")
        with pytest.raises(litellm.AuthenticationError):
            await complete("desk-assistant", OPENING, key="wrong")

    asyncio.run(talk())


def test_a_port_in_use_ends_with_one_sentence(address, tmp_path):
    process = start(tmp_path / "address", "--port", address.rpartition(":")[2])
    _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert stderr.startswith("error: cannot listen on")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "address").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux only")
def test_it_dies_with_its_parent(tmp_path):
    ready = tmp_path / "address"
    code = (
        "import subprocess, sys, pathlib, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'collab_megatron.demo.endpoint', '--die-with-parent',"
        " '--ready-file', sys.argv[1]], stdout=subprocess.DEVNULL)\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)\n"
        "print(child.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ready)], capture_output=True, text=True, timeout=DEADLINE_S)
    child = int(done.stdout)
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the endpoint outlived its parent"
        time.sleep(0.05)
