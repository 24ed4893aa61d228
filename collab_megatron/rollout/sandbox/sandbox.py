"""Sandbox: runs one untrusted Python program at a time in its own process, with limits, cut off from this machine.

    sandbox = Sandbox(SandboxLimits(), python=None)
    run = await sandbox.run(("-c", "print(1)"), b"")

launcher.py describes how a program is cut off. What it cannot do: reach the network, see other processes, environment
or files of this machine besides the system's libraries and its interpreter, write anywhere but in memory, outlive its
run. What the sandbox cannot do: protect a program's tests from the program, which run in one process.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from collab_megatron.concurrency import cancel_all, run_all
from collab_megatron.errors import UserError
from collab_megatron.rollout.sandbox.launcher import MEMORY, SETUP, TIMEOUT

Mode = Literal["isolated", "bubblewrap", "unsafe"]
Ended = Literal["ended", "timeout", "memory", "output", "no_sandbox"]
LAUNCHER = Path(__file__).with_name("launcher.py")
logger = logging.getLogger(__name__)
CHUNK = 65536
KEPT_BYTES = 4096  # of the end of the program's output
RESULT_BYTES = 1 << 20  # of standard output
GRACE_S = 5.0  # beyond the launcher's own deadline, for its start on a busy machine
PROBE_S = 60.0
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
OF_ETC = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # a thread pool for every core would not fit into the limits
    "OPENBLAS_NUM_THREADS": "1",
}
CODES: dict[int, Ended] = {TIMEOUT: "timeout", MEMORY: "memory", SETUP: "no_sandbox"}


@dataclass(frozen=True)
class SandboxLimits:
    """Of one run."""

    time_s: float = 20.0  # processor time too
    memory_mb: int = 2048  # address space of each process, and memory of all together
    processes: int = 64  # threads count too
    disk_mb: int = 64  # of the temporary directory, which is in memory; and of each file
    output_mb: float = 8.0  # standard output and error


@dataclass(frozen=True)
class SandboxRun:
    """How a program ended.

    Example: SandboxRun("timeout", 1, b"", "step 1 done") was ended at its deadline.
    """

    ended: Ended  # ended: by itself, whatever its exit code
    exit_code: int  # 0 or 1; 1 for whatever is not 0
    result: bytes  # standard output
    output: str  # the end of standard error; the reason where there is no sandbox


class Sandbox:
    """Raises UserError, with the reason, if programs cannot be isolated here and `unsafe` is not allowed."""

    def __init__(
        self,
        limits: SandboxLimits,
        *,
        python: Path | None = None,
        unsafe: bool = False,
        max_concurrency: int | None = None,
        setting: str = "sandbox",
        tried: bool = True,
    ) -> None:
        """`python`: the programs' interpreter, ours by default. `setting`: the config's key that allows `unsafe`.
        Without `tried` nothing is checked, and nothing can be run."""
        self._limits = limits
        self.mode: Mode = "unsafe" if unsafe else "isolated"
        if tried:
            self._python, self._shows = interpreter(Path(python or sys.executable))
            self.mode = "unsafe" if unsafe else isolation(self._python, self._shows, setting)
        self._slots = asyncio.Semaphore(max_concurrency or os.cpu_count() or 1)

    async def run(self, arguments: Sequence[str], given: bytes) -> SandboxRun:
        """Run the interpreter with `arguments`; `given` is its standard input.

        Waits for a slot, then for the program, at most `time_s` and some seconds.
        """
        async with self._slots:
            with tempfile.TemporaryDirectory(prefix="collab_megatron_sandbox_", ignore_cleanup_errors=True) as folder:
                return await self._run(
                    _launch(self.mode, self._limits, self._python, self._shows, arguments, folder), given
                )

    async def _run(self, command: list[str], given: bytes) -> SandboxRun:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        assert process.stderr is not None, "it is a pipe"
        ended: Ended | None = None
        feed = asyncio.ensure_future(_feed(process.stdin, given))
        result, output = _Kept(RESULT_BYTES, first=True), _Kept(int(self._limits.output_mb * (1 << 20)), first=False)
        try:
            async with asyncio.timeout(self._limits.time_s + GRACE_S):
                await run_all((result.read(process.stdout), output.read(process.stderr)))
                await process.wait()
        except TimeoutError:
            ended = "timeout"
        except _TooMuch:
            ended = "output"
        finally:
            if process.returncode is None and self.mode == "unsafe":
                await _terminated(process)
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)  # PID 1 of the sandbox is in this group
                await _drained(process)
            await cancel_all([feed])
        code = process.returncode or 0
        return SandboxRun(
            ended or CODES.get(code, "ended"),
            min(abs(code), 1),
            result.content,
            output.content.decode(errors="replace"),
        )


async def _terminated(process: asyncio.subprocess.Process) -> None:
    """Let the launcher end what the program has forked: without isolation nobody else finds it. Waits at most
    GRACE_S."""
    with suppress(ProcessLookupError, TimeoutError):
        process.terminate()
        async with asyncio.timeout(GRACE_S):
            await _ended(process)


async def _drained(process: asyncio.subprocess.Process) -> None:
    """Waits until a process that was killed has ended. Gives up on pipes that others hold open, which only happens
    without isolation."""
    try:
        async with asyncio.timeout(GRACE_S):
            await _ended(process)
    except TimeoutError:
        logger.warning("a program without isolation left processes that hold its output open")


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Waits for the end of a process; asyncio notices it only once the pipes are empty."""
    for stream in filter(None, (process.stdout, process.stderr)):
        while await stream.read(CHUNK):
            pass
    await process.wait()


class _TooMuch(Exception):
    """A program wrote more than it may."""


class _Kept:
    """The beginning or end of a stream."""

    def __init__(self, most: int, *, first: bool) -> None:
        self._most, self._first = most, first
        self._total = 0
        self.content = b""

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Waits for the end of the stream. Raises _TooMuch."""
        while chunk := await stream.read(CHUNK):
            self._total += len(chunk)
            self.content = self.content + chunk if self._first else (self.content + chunk)[-KEPT_BYTES:]
            if self._total > self._most:
                raise _TooMuch


async def _feed(stream: asyncio.StreamWriter, given: bytes) -> None:
    """Waits until the program has read its input, or has ended."""
    try:
        stream.write(given)
        await stream.drain()
    except ConnectionError:  # it did not read all of it
        return
    finally:
        stream.close()


@functools.cache
def interpreter(python: Path) -> tuple[str, tuple[str, ...]]:
    """(path, folders that it needs). Raises UserError if it does not run."""
    code = "import json, os, sys; print(json.dumps([sys.executable, sys.prefix, sys.base_prefix, os.__file__]))"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, timeout=PROBE_S, check=True, env={})
        path, prefix, base, library = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"{python} is not a Python interpreter that runs ({error}): name one for the sandbox") from None
    prefix, venv = os.path.realpath(prefix), Path(path).parent.parent
    if venv.resolve() == Path(prefix):  # a link on the way to it does not exist inside
        path = os.path.join(prefix, Path(path).parent.name, Path(path).name)
    needed = {prefix, os.path.realpath(base), os.path.realpath(os.path.dirname(library)), _home(path)}
    folders = sorted(folder for folder in needed if not folder.startswith("/usr/") and folder != "/usr")
    if open_to_all := {"/", str(Path.home())} & set(folders):
        raise UserError(f"{python} needs the whole of {min(open_to_all)}, which the sandbox hides: use a venv")
    return path, tuple(folders)


def _home(path: str) -> str:
    """The folder above the `bin` of the program that a chain of links ends in."""
    return str(Path(path).resolve().parent.parent)


@functools.cache
def isolation(python: str, shows: tuple[str, ...], setting: str) -> Mode:
    """How programs are isolated on this machine: tried, not guessed. Raises UserError with the reasons."""
    reasons = []
    ways: tuple[Mode, ...] = ("isolated", "bubblewrap")
    for mode in ways:
        if mode == "bubblewrap" and shutil.which("bwrap") is None:
            reasons.append("there is no bwrap (bubblewrap)")
            continue
        if mode == "bubblewrap" and not os.geteuid():
            reasons.append("bubblewrap cannot limit the processes of root")
            continue
        command = _launch(mode, SandboxLimits(), python, shows, ("-I", "-c", "pass"), "/tmp")
        try:
            done = subprocess.run(command, capture_output=True, timeout=PROBE_S, check=False, env={}, cwd="/")
        except subprocess.TimeoutExpired:
            reasons.append(f"{mode}: no answer in {PROBE_S:g} s")
            continue
        if not done.returncode:
            return mode
        said = done.stderr.decode(errors="replace").strip()
        reasons.append(f"{mode}: {said or f'exit code {done.returncode}'}")
    raise UserError(
        f"programs of the policy cannot be isolated on this machine ({'; '.join(reasons)}): allow user namespaces, "
        f"install bubblewrap, or set {setting}=unsafe if this machine needs no protection from what a model writes"
    )


def _launch(
    mode: Mode, limits: SandboxLimits, python: str, shows: tuple[str, ...], arguments: Sequence[str], folder: str
) -> list[str]:
    """The command line of the launcher. `folder`: an empty one, used in the mode `unsafe`."""
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    system = [path for path in (*SYSTEM, *OF_ETC) if path not in links and os.path.exists(path)]
    home, temporary = (folder, folder) if mode == "unsafe" else ("/home", "/tmp")
    spec: dict[str, Any] = {
        "mode": mode,
        **asdict(limits),
        "shows": [*system, *DEVICES, *shows],
        "links": links,
        "folder": temporary,
        "command": [python, *arguments],
        "environment": {**ENVIRONMENT, "HOME": home, "TMPDIR": temporary},
    }
    if mode == "bubblewrap":
        spec |= {"folder": folder, "command": _bubblewrap(spec | {"mode": "inside"}), "environment": {}}
    return [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(spec)]


def _bubblewrap(spec: dict[str, Any]) -> list[str]:
    """The command line of bubblewrap around the launcher with `spec`."""
    inner = "/launcher.py"
    binds = [(path, path) for path in spec["shows"] if path not in DEVICES]
    size = str(spec["disk_mb"] << 20)
    return [
        shutil.which("bwrap") or "bwrap",
        *("--unshare-all", "--die-with-parent", "--cap-drop", "ALL"),
        *(part for path, to in spec["links"].items() for part in ("--symlink", to, path)),
        *("--dev", "/dev", "--proc", "/proc", "--size", size, "--tmpfs", "/tmp", "--size", size, "--tmpfs", "/home"),
        # after the empty folders: an interpreter may lie below /home or /tmp
        *(part for path, to in (*binds, (str(LAUNCHER), inner)) for part in ("--ro-bind", path, to)),
        *("--remount-ro", "/"),
        *(spec["command"][0], "-I", "-S", inner, json.dumps(spec)),
    ]
