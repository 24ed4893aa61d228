"""The name of served weights depends on their contents only."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from collab_megatron.engine.control import served_weights
from collab_megatron.errors import RunError, UserError


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


@pytest.mark.slow
def test_running_servers_are_named_by_what_they_hold() -> None:
    with server("1") as one, server("1") as same, server("2") as other:
        name = served_weights([one], timeout_s=5)
        assert name == served_weights([one, same], timeout_s=5)
        assert name != served_weights([other], timeout_s=5)
        with pytest.raises(UserError, match="serve different weights"):
            served_weights([one, other], timeout_s=5)
    with server(None, "3") as third, server(None, "4") as fourth:  # no checksums: their weight versions
        assert served_weights([third], timeout_s=5) != served_weights([fourth], timeout_s=5)
    with pytest.raises(RunError, match="is gone"):
        served_weights([one], timeout_s=5)
