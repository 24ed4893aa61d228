"""Ten thousand inputs on the demo's endpoint, with its key and without."""

from __future__ import annotations

import random
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from collab_megatron.launch.supervisor import Supervisor
from tests.conftest import DESK_KEY, Server
from tests.fuzz import INPUTS, http_input, send_each, statuses, steady

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/v1/../x")
FORM = {
    "model": "desk-assistant",
    "messages": [{"role": "user", "content": "please book a room for alice"}],
    "temperature": 1.0,
    "n": 1,
    "seed": 3,
}


@pytest.mark.parametrize("key", [None, DESK_KEY], ids=["without", "with"])
def test_desk_endpoint(desk: Server, supervisor: Supervisor, key: str | None) -> None:
    rng = random.Random(13)
    parts = urlsplit(desk.url)
    where = (parts.hostname or "", parts.port or 0)
    given = None if key is None else f"Bearer {key}".encode()
    log = Path(supervisor.logs_dir) / "endpoint.log"
    send_each(where, [http_input(rng, PATHS, FORM, given) for _ in range(1000)], waits=False)
    size = log.stat().st_size
    with steady(desk.pid, memory_mb=30):
        found = statuses(send_each(where, (http_input(rng, PATHS, FORM, given) for _ in range(INPUTS)), waits=False))
    assert sum(found.values()) == INPUTS
    assert not {status for status in found if status >= 500}, found
    if key is None:
        assert found[401] > INPUTS / 8
        assert found.get(200, 0) < INPUTS / 4  # /health
    else:
        assert found[400] > INPUTS / 8
        assert found[200] > INPUTS / 20
    assert log.stat().st_size - size < 100_000, "strangers must not fill the disk"
    answer = httpx.post(
        f"{desk.url}/chat/completions", json=FORM, headers={"Authorization": f"Bearer {DESK_KEY}"}, trust_env=False
    )
    assert answer.status_code == 200
