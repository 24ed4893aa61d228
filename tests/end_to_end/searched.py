"""Where the secrets of a run are: searched in every file, command line and environment of a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from collab_megatron.engine.keys import EngineKeys
from tests.conftest import DESK_KEY

HOLDERS = {"engine_keys.yaml", "live.json", "driver.token"}
"""The files of mode 600 that may have a secret."""
DRIVER = "collab_megatron.rollout.service"


def option(family: Sequence[psutil.Process], program: str, name: str) -> str:
    """The value of an option of the first process that was started with the word `program`."""
    command = next(command for command in (p.cmdline() for p in family if p.is_running()) if program in command)
    return command[command.index(name) + 1]


def secrets_of(family: Sequence[psutil.Process], logs: Path) -> Mapping[str, str]:
    """Name -> secret of a run that is under way."""
    keys = EngineKeys.read(Path(option(family, "sglang.launch_server", "--config")))
    return {
        "API key": DESK_KEY,
        "engine key": keys.api,
        "engine's admin key": keys.admin,
        "driver's token": Path(option(family, DRIVER, "--token-file")).read_text(),
        "live page's key": json.loads((logs / "live.json").read_text())["key"],
    }


def require_secrets_kept(family: Sequence[psutil.Process], folders: Sequence[Path], secrets: Mapping[str, str]) -> None:
    """No secret on a command line, in a file besides HOLDERS, or in an environment, except the API key in those of
    drivers, which call the API; and no memory in a core dump."""
    assert len(set(secrets.values())) == 5
    drivers = 0
    for process in family:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            continue
        command, environment = process.cmdline(), process.environ()
        told = json.dumps([command, {**environment, "DESK_API_KEY": ""}])
        assert found_in(told.encode(), secrets) == [], command
        is_driver = DRIVER in command
        drivers += is_driver
        assert ("DESK_API_KEY" in environment) == is_driver, (command, sorted(environment))
        limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
        (core,) = (line.split() for line in limits if line.startswith("Max core file size"))
        assert core[4] == "0", (command, core)
        assert int(Path(f"/proc/{process.pid}/coredump_filter").read_text(), 16) == 0, command
    assert drivers == 1
    held = require_files_clean(folders, secrets)
    assert held >= HOLDERS


def require_files_clean(folders: Sequence[Path], secrets: Mapping[str, str]) -> set[str]:
    """No file besides HOLDERS has a secret; the names of those that have one."""
    read, held = 0, set()
    for file in files(folders):
        try:
            found = found_in(file.read_bytes(), secrets)
            mode = file.stat().st_mode
        except FileNotFoundError:  # a temporary one
            continue
        read += 1
        if found:
            assert file.name in HOLDERS, (file, found)
            assert mode & 0o077 == 0, (file, oct(mode))
            held.add(file.name)
    assert read > 20
    return held


def found_in(content: bytes, secrets: Mapping[str, str]) -> list[str]:
    """Names of the secrets in it."""
    return [name for name, secret in secrets.items() if secret.encode() in content]


def files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
