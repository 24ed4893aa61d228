"""What is in the file is what was given: neither environment nor headers nor what a key was made of."""

from __future__ import annotations

import base64
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm.role_journal import reply_key
from collab_megatron.types import LLMReply
from tests.conftest import DESK_KEY, Server
from tests.rollout.journal.samples import key, raw, turn


def test_no_secret_reaches_the_file(desk: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is a real one, with its key in the environment and in a header."""
    path = tmp_path / "run.sqlite"
    monkeypatch.setenv("DESK_API_KEY", DESK_KEY)
    messages = [{"role": "user", "content": "please book a room for alice"}]
    parameters = {"temperature": 1.0, "n": 1, "seed": 3}
    response = httpx.post(
        f"{desk.url}/chat/completions",
        json={"model": "desk-assistant", "messages": messages, **parameters},
        headers={"Authorization": f"Bearer {DESK_KEY}"},
        trust_env=False,
    )
    body = response.raise_for_status().json()
    text = body["choices"][0]["message"]["content"]
    recorded = LLMReply((text,), 6, 8, 0.001, 0.1, body["model"], body["system_fingerprint"])
    with closing(Journal(path, replay="auto", lineage="of these weights")) as journal:
        journal.record_reply(reply_key("desk-assistant", messages, parameters, 0), "assistant", recorded)
        journal.record_turn(key(1), [turn()])
        journal.record_delivery(0, 0, b"a batch")
        open_ = raw(path)
    closed = raw(path)
    for content in (open_, closed):
        assert text.encode() in content
        assert b"desk-assistant" in content
        for secret in (DESK_KEY, "Bearer", "Authorization", "DESK_API_KEY", messages[0]["content"]):
            plain = secret.encode()
            assert plain not in content
            assert plain.hex().encode() not in content
            assert base64.b64encode(plain).rstrip(b"=") not in content
