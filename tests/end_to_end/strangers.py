"""Attempts of other users on the node to reach the processes of a run."""

from __future__ import annotations

import contextlib
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
import psutil
import zmq

from collab_megatron.engine.keys import EngineKeys
from tests.listening import listening, open_to_others

STRANGERS_TRY = (
    *(("GET", path) for path in ("/model_info", "/server_info", "/v1/loads", "/get_weights_by_name")),
    *(("POST", path) for path in ("/generate", "/pause_generation", "/flush_cache", "/update_weights_from_disk")),
    *(("POST", path) for path in ("/init_weights_update_group", "/release_memory_occupation", "/abort_request")),
)


def require_closed_to_strangers(family: Sequence[psutil.Process], folder: Path) -> None:
    """Nothing that the run's processes listen at can be reached from another machine; the engine wants its keys, which
    stand on no command line and in no file of the run."""
    listeners = {p.pid: listening(p.pid) for p in family}
    assert sum(map(bool, listeners.values())) >= 4, listeners  # both trainer ranks, the server and its scheduler
    assert open_to_others(listeners) == {}
    server = _command(family, "sglang.launch_server")
    keys_file = Path(server[server.index("--config") + 1])
    keys = EngineKeys.read(keys_file)
    assert stat.S_IMODE(keys_file.parent.stat().st_mode) == 0o700
    told = [str((p.cmdline(), p.environ())) for p in family if p.is_running()]
    assert not any(key in text for text in told for key in (keys.api, keys.admin))
    written = [file.read_bytes() for file in folder.rglob("*") if file.suffix in (".log", ".yaml", ".json", ".jsonl")]
    assert len(written) > 3
    assert not any(key.encode() in text for text in written for key in (keys.api, keys.admin))
    url = f"http://127.0.0.1:{server[server.index('--port') + 1]}"
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as stranger:
        refused = {
            stranger.request(method, path, headers=headers).status_code
            for headers in ({}, {"Authorization": "Bearer guessed"})
            for method, path in STRANGERS_TRY
        }
        assert refused == {401}
        # the key for questions opens nothing that changes the server
        asking = dict(keys.header("generate"))
        assert stranger.get("/model_info", headers=asking).status_code == 200
        assert stranger.post("/pause_generation", json={}, headers=asking).status_code == 401


@contextlib.contextmanager
def knock_at_the_driver(driver: Sequence[str], family: Sequence[psutil.Process]) -> Iterator[None]:
    """With messages of all kinds, and raw connections that stay open for the length of the block. driver: its command
    line."""
    address = driver[driver.index("--address") + 1]
    path = Path(address.removeprefix("ipc://"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert open_to_others(p.pid for p in family) == {}
    with contextlib.ExitStack() as stack:
        for number in range(30):
            raw = stack.enter_context(socket.socket(socket.AF_UNIX))
            raw.connect(str(path))
            raw.sendall(b"\x01\x00\x01\x01\x06\x00hello" if number % 2 else b"\x00" * 64)
        context = stack.enter_context(zmq.Context())
        stranger = stack.enter_context(context.socket(zmq.DEALER))
        stranger.connect(address)
        for payload in (b"", b"\xc1", msgspec.msgpack.encode({"op": "stop"})):
            for token in (b"", b"guessed"):
                stranger.send_multipart([b"", token, payload])
                stranger.send_multipart([b"", payload])
        yield


def _command(family: Sequence[psutil.Process], word: str) -> list[str]:
    """The command line of the first process that was started with that word."""
    return next(command for command in (p.cmdline() for p in family if p.is_running()) if word in command)
