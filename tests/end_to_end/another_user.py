"""What another user of the node can do to a run under way: a real process with another uid tries."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end.searched import DRIVER, option
from tests.end_to_end.strangers import STRANGERS_TRY
from tests.listening import listening, unix_listening
from tests.stranger import DONE, as_stranger

# without authentication, on loopback; docs/operations.md#keys-and-ports says what a stranger can do there
OF_TORCH = "TCPStore, gloo"


def require_nothing_for_another_user(family: Sequence[psutil.Process], folder: Path, shared: Sequence[Path]) -> None:
    """folder: run.dir. shared: the run's files in /dev/shm. Needs root, to become another user."""
    server = f"http://127.0.0.1:{option(family, 'sglang.launch_server', '--port')}"
    live = json.loads((folder / "logs" / "rl" / "latest" / "live.json").read_text())["url"]
    keys_file = Path(option(family, "sglang.launch_server", "--config"))
    scratch = keys_file.parent
    running = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    sockets = {path for process in running for path in unix_listening(process.pid)}
    assert sockets  # the driver's, SGLang's, torch's
    assert not [path for path in sockets if path.startswith("@")], "abstract sockets have no owner"
    explained = require_listeners_explained(running, {server, live})
    assert OF_TORCH in explained
    of_files: list[dict[str, Any]] = [
        *({"list": str(path)} for path in (folder, scratch, *(folder / name for name in ("logs", "conversations")))),
        {"read": str(keys_file)},
        {"read": option(family, DRIVER, "--token-file")},
        {"read": str(folder / "logs" / "rl" / "latest" / "live.json")},
        {"write": str(scratch / "owner")},
        {"write": str(folder / "new")},
        *({"read": str(path)} for path in shared),
        *({"write": str(path)} for path in shared),
        *({"unix": path} for path in sorted(sockets)),
    ]
    of_processes: list[dict[str, Any]] = [
        attempt
        for process in running
        for attempt in (
            *({"read": f"/proc/{process.pid}/{name}"} for name in ("environ", "mem", "maps")),
            {"list": f"/proc/{process.pid}/fd"},
        )
    ]
    guessed = {"Authorization": "Bearer guessed"}
    asked: list[dict[str, Any]] = [
        {"http": [method, server + path, headers]} for method, path in STRANGERS_TRY for headers in ({}, guessed)
    ]
    asked += [{"http": ["GET", live + path, headers]} for path in ("/", "/status") for headers in ({}, guessed)]
    with passable(folder.parent), passable(scratch.parent):
        require(as_stranger([{"list": str(folder.parent)}, {"list": str(scratch.parent)}]), {DONE}, ["the way there"])
        require(as_stranger(of_files), {"EACCES"}, of_files)
        require(as_stranger(of_processes), {"EACCES", "EPERM", "ENOENT"}, of_processes)
        require(as_stranger(asked), {"401"}, asked)
        kills = [{"kill": process.pid} for process in running]
        require(as_stranger(kills), {"EPERM"}, kills)


def require(found: Sequence[str], allowed: set[str], attempts: Sequence[Any]) -> None:
    wrong = [(attempt, result) for attempt, result in zip(attempts, found, strict=False) if result not in allowed]
    assert not wrong, wrong[:5]


def require_listeners_explained(running: Sequence[psutil.Process], with_keys: set[str]) -> set[str]:
    """Every TCP listener is one that asks for a key, or torch's of a trainer rank or of an engine's scheduler."""
    ports = {int(url.rpartition(":")[2]) for url in with_keys}
    explained = set()
    for process in running:
        command = " ".join(process.cmdline())
        for address, port in listening(process.pid):
            assert address.is_loopback
            if port in ports:
                explained.add("key")
                continue
            assert "--trainer-rank" in command or "sglang::scheduler" in command, (command, port)
            explained.add(OF_TORCH)
    return explained


@contextlib.contextmanager
def passable(folder: Path) -> Iterator[None]:
    """Others may list `folder` and pass what is above it, as is usual on nodes; pytest closes its folders."""
    before = {}
    try:
        for path in (folder, *folder.parents):
            status = path.stat()
            if status.st_uid == os.getuid() and status.st_mode & 0o005 != 0o005:
                before[path] = status.st_mode & 0o7777
                path.chmod(before[path] | 0o005)
        yield
    finally:
        for path, mode in before.items():
            path.chmod(mode)
