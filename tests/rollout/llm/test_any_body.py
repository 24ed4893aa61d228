"""Bodies of API answers with broken bytes: each is a failed attempt or a malformed reply, nothing else is raised."""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.llm.accounting import CALLS
from collab_megatron.rollout.llm.parsing import json_object
from collab_megatron.rollout.llm.role_client import RoleClient
from collab_megatron.types import CallRecord
from tests.rollout.llm.calls import config_for, hello, use_role
from tests.rollout.llm.misbehaving import MisbehavingEndpoint, completion

pytestmark = pytest.mark.slow

BODIES = 60
PLACES: list[list[Any]] = [
    *(["usage"], ["usage", "prompt_tokens"], ["usage", "completion_tokens"], ["model"], ["system_fingerprint"]),
    *(["choices"], ["choices", 0], ["choices", 0, "message"], ["choices", 0, "finish_reason"]),
    *(["choices", 0, "message", "content"], ["choices", 0, "message", "role"]),
]
GOOD = '{"response": "fine \ud83d\ude00"}'


class Mutating(MisbehavingEndpoint):
    """Says `odd` first, then answers with some bytes changed."""

    def __init__(self, odd: list[bytes]) -> None:
        super().__init__(lambda body: GOOD, seed=2)
        self._odd = odd

    async def _act(self, kind: str, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        data = bytearray(json.dumps(completion(body, GOOD)).encode())
        for _ in range(self._chance.randint(0, 2)):
            at = self._chance.randrange(len(data))
            data[at : at + self._chance.randint(0, 2)] = self._chance.randbytes(self._chance.randint(0, 2))
        return web.Response(body=self._odd.pop() if self._odd else bytes(data), content_type="application/json")


def _odd_bodies() -> list[bytes]:
    """Values of other kinds than the API promises, each in its place."""
    asked = {"model": "m"}
    values: list[Any] = [None, "half \ud800", 2**70, 1e400, [["x"]], {}]
    bodies: list[bytes] = []
    for path in PLACES:
        for value in values:
            body: Any = completion(asked, GOOD)
            place = body
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
            bodies.append(json.dumps(body).encode())
    return [*bodies, b"[" * 100_000, b"\xff\xfe", b"", b"null", b"[]", b'"x"']


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_no_body_raises_anything_but_a_failed_call(tmp_path: Path) -> None:
    odd = _odd_bodies()
    random.Random(1).shuffle(odd)
    count = len(odd) + BODIES
    kept: list[dict[str, Any]] = []

    async def body(role: RoleClient) -> None:
        calls: list[CallRecord] = []
        CALLS.set(calls)
        for index in range(count):
            try:
                kept.extend(await role.complete(hello(sample_index=index, parse=json_object)))
            except SimulatorError as error:
                str(error).encode()
        for call in calls:
            call.answered_by.encode()

    with Mutating(odd) as endpoint, closing(Journal(tmp_path / "j", replay="auto", lineage="t")) as journal:
        _, usage = use_role(config_for(endpoint.url, max_attempts=1), body, journal=journal)
    assert not odd
    assert usage.attempts == count
    assert usage.answers + usage.bad_bodies + usage.rejected + usage.server_errors == count
    assert min(usage.bad_bodies, len(kept)) > 10
    for value in kept:
        json.dumps(value, ensure_ascii=False).encode()
