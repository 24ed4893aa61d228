"""A Hugging Face hub of one model over HTTP, as far as huggingface_hub asks it: revision, files, ranges of bytes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the model `name`."""

    daemon_threads = True

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.folder = name, folder
        self.sent: Counter[str] = Counter()  # bytes of each file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing: requests are counted."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.server
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{hub.name}/tree/"):
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file.read_bytes())}
                for file in sorted(hub.folder.iterdir())
            ]
            return self._send(json.dumps(tree).encode(), {}, body=body)
        if path.startswith(f"/api/models/{hub.name}"):
            files = [{"rfilename": file.name} for file in sorted(hub.folder.iterdir())]
            told = {"id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
            return self._send(json.dumps(told).encode(), {}, body=body)
        match = re.fullmatch(rf"/{hub.name}/resolve/[^/]+/(.+)", path)
        file = hub.folder / match[1] if match else None
        if file is None or not file.is_file():
            self.send_response(HTTPStatus.NOT_FOUND)
            self.send_header("X-Error-Code", "EntryNotFound" if match else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status, wanted = HTTPStatus.OK, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted:
            size, content = len(content), content[int(wanted[1]) : int(wanted[2]) + 1]
            headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(content) - 1}/{size}"
            status = HTTPStatus.PARTIAL_CONTENT
        hub.sent[file.name] += len(content) if body else 0
        return self._send(content, headers, body=body, status=status)

    def _send(self, content: bytes, headers: dict[str, str], *, body: bool, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


@contextmanager
def serving(name: str, folder: Path) -> Iterator[Hub]:
    """The hub, until the block ends."""
    with Hub(name, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(10)
