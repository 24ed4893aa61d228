"""The name of a set of weights follows their contents."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from collab_megatron.cluster import weights
from collab_megatron.cluster.weights import folder_name, served_name
from collab_megatron.errors import RunError, UserError


def model(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder


def test_the_name_is_of_the_contents_and_not_of_the_path(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    name = folder_name(first)
    assert name == folder_name(model(tmp_path / "b"))
    (first / "model.safetensors").write_bytes(b"weighty")  # as long, under the same name
    assert folder_name(first) != name
    second = model(tmp_path / "c")
    (second / "chat_template.jinja").write_text("{{ messages }}")
    assert folder_name(second) != name


def test_a_large_file_is_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WHOLE_BYTES", 100)
    monkeypatch.setattr(weights, "SAMPLE_BYTES", 10)
    content = bytearray(10_000)
    name = folder_name(model(tmp_path / "a", bytes(content)))
    for place in (0, 9_999):
        changed = bytes(content[:place]) + b"x" + bytes(content[place + 1 :])
        assert folder_name(model(tmp_path / str(place), changed)) != name


@contextmanager
def server(checksum: str | None, version: str = "default") -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self, code: int, body: object) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            ranks = [{"parallelism_info": [{"tp_rank": 0}], "checksums": {"w": checksum}}]
            self.reply(*((404, {}) if checksum is None else (200, {"success": True, "ranks": ranks})))

        def do_GET(self) -> None:
            self.reply(200, {"weight_version": version})

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_running_servers_are_named_by_what_they_hold(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    with server("1") as one, server("1") as same, server("2") as other:
        name = served_name([one], folder, timeout_s=5)
        assert name == served_name([one, same], folder, timeout_s=5)
        assert name != served_name([other], folder, timeout_s=5)
        with pytest.raises(UserError, match="serve different weights"):
            served_name([one, other], folder, timeout_s=5)
    with server(None, "3") as third, server(None, "4") as fourth:  # no checksums: what they say of themselves
        assert served_name([third], folder, timeout_s=5) != served_name([fourth], folder, timeout_s=5)
    with pytest.raises(RunError, match="is gone"):
        served_name([one], folder, timeout_s=5)
