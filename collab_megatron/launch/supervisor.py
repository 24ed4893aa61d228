"""Supervisor of child processes, which never outlive it: each has its own process group and a parent-death signal.

The failure of an essential child ends all children. Other children (servers that can restart) are watched by the code
that started them. A child that a signal has stopped counts as failed after a while (stopped.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from collab_megatron.errors import (
    EXIT_BUDGET,
    EXIT_INTERRUPTED,
    EXIT_RUN,
    EXIT_USER,
    BudgetSpent,
    RunError,
)
from collab_megatron.files import publish_secret
from collab_megatron.launch.child_process import NOT_SHOWN, ChildProcess, Ready, tail
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.readiness import Readiness, ReadinessProbe
from collab_megatron.launch.scratch import ScratchFolder
from collab_megatron.launch.stopped import StoppedWatch, all_processes
from collab_megatron.signals import die_with_parent, end_at_signals

GRACE_S = 10.0  # between TERM and KILL
SAY_S = 5.0  # on top of the grace time of children that save: they end themselves and print why


class Supervisor:
    """Starts children and ends all of them when its block ends, for any reason. Use as a context manager.

    The children share a temporary folder (scratch.py), which is removed at the end; without `logs_dir` it also holds
    the logs. `held`: open files that every child inherits, so that their locks (flock) last until the last child ends.
    `stopped_timeout_s`: a child that is stopped for this long has failed; None: no check.
    `save_grace_s`: time between TERM and KILL for children that save (train.save_grace_s). `env`: of every child.
    """

    def __init__(
        self,
        logs_dir: Path | None = None,
        held: Sequence[int] = (),
        *,
        stopped_timeout_s: float | None = None,
        save_grace_s: float = 0.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._logs_dir = logs_dir or Path()
        self._keeps_logs = logs_dir is not None
        self._held = tuple(held)
        self._save_grace_s = save_grace_s
        self._env = dict(env or {})
        self._scratch: ScratchFolder | None = None
        self._children: list[ChildProcess] = []
        self._stopped = None if stopped_timeout_s is None else StoppedWatch(stopped_timeout_s)

    def __enter__(self) -> Supervisor:
        self._logs_dir.mkdir(parents=True, exist_ok=True)
        self._scratch = ScratchFolder.create()
        if not self._keeps_logs:
            self._logs_dir = self._scratch.folder
        self._end_at_signals()
        return self

    def _end_at_signals(self) -> None:
        # Ctrl-C too if a second one would interrupt a save; the asyncio loop of an evaluation handles it itself
        end_at_signals(*((signal.SIGINT,) if self._save_grace_s else ()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self.note_shared_memory()
            finally:
                self.end_all()
        finally:  # a second signal kills the children at once and raises
            if self._scratch is not None:
                self._scratch.remove()
                self._scratch = None

    @property
    def logs_dir(self) -> Path:
        """The folder of the children's logs."""
        return self._logs_dir

    @property
    def scratch(self) -> Path:
        """The temporary folder of this run, mode 0700; TMPDIR of every child."""
        assert self._scratch is not None, "entered, and not left yet"
        return self._scratch.folder

    def note_shared_memory(self) -> None:
        """Write down the files of the children in /dev/shm, so that the next start can clean up after kill -9."""
        if self._scratch is not None:
            self._scratch.note_shared_memory({child.process.pid for child in self._children})

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        show: bool = False,
        essential: bool = True,
        restarted: bool = False,
        saves: bool = False,
        unset: Sequence[str] = (),
        ready: Ready = NOT_SHOWN,
    ) -> ChildProcess:
        """Start `argv` with our environment, without `unset`, plus `env`. Output goes to LOGS/name.log, or to our own
        if `show`. ready: kept in the child, for `readiness`."""
        log = None if show else self._logs_dir / f"{name}.log"
        # SGLang logs its API keys at --log-level info: readable by the owner only, whatever the umask is
        mode = 0o600 if name.startswith("engine-") else 0o666
        sink = None if log is None else os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode), "ab")
        ours = {key: value for key, value in os.environ.items() if key not in unset}
        scratch, held = self._scratch, self._held
        if scratch is not None:
            ours |= {"TMPDIR": str(scratch.folder)} | _lasting_caches()
            held = (*held, scratch.held)
        try:
            process = subprocess.Popen(
                list(argv),
                env={**ours, **self._env, **env},
                pass_fds=held,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink and subprocess.STDOUT,
                start_new_session=True,  # its own group: one kill reaches its children too
                preexec_fn=die_with_parent,
            )
        finally:
            if sink is not None:
                sink.close()
        child = ChildProcess(name, process, log, essential, restarted, saves, ready=ready)
        self._children.append(child)
        return child

    def publish(self, name: str, text: str) -> Path:
        """Write a file of mode 600 for the children, before or after their start; its path as they see it. Raises
        RunError when the disk refuses."""
        publish_secret(self.scratch / name, text)
        return self.scratch / name

    def port_for(self, host: str, taken: Collection[int | None]) -> int:
        """A free port of `host`, not one of `taken`: the server that was given that one may not have opened it yet."""
        while (port := free_port(host)) in taken:
            pass
        return port

    def readiness(self, child: ChildProcess, *, every_s: float) -> Readiness:
        """Whether the server `child.ready.url` answers; asked at most every `every_s` seconds."""
        return ReadinessProbe(child.ready.url, every_s=every_s)

    def was_ready(self, child: ChildProcess) -> bool:
        """Whether its ready file is there."""
        return Path(child.ready.file).exists()

    def pass_on_addresses(self, children: Sequence[ChildProcess]) -> None:
        """Show the ready files of `children` to the other children. Here they share the folder."""

    def check(self) -> None:
        """Raise RunError (or exit with 2 for a user's mistake) if an essential child has failed or was stopped for too
        long."""
        self._look_for_stopped()
        if self._scratch is not None:
            self._scratch.touch()
        for child in self._children:
            code = child.process.poll()
            if child.essential and code and not child.will_restart():
                self.fail(child)

    def _look_for_stopped(self) -> None:
        """Children that restart are marked as hung; their starter kills them."""
        if self._stopped is None:
            return
        running = {child.process.pid: child for child in self._children if child.process.poll() is None}
        for group, why in self._stopped.over(running).items():
            child = running[group]
            if child.essential and not child.restarted:
                raise RunError(f"{child.name} is given up: {why}; see {child.log or 'its output above'}")
            child.hung = why

    def wait_for(
        self,
        children: Sequence[ChildProcess],
        *,
        timeout_s: float | None = None,
        poll_s: float = 0.1,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait until all `children` have succeeded; the failure of an essential child ends all. `tick` is called
        repeatedly and must return quickly.

        Without `timeout_s` there is no deadline, because training has none. Raises RunError at the deadline.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while running := [child.name for child in children if child.process.poll() is None]:
            self.check()
            tick()
            if deadline is not None and time.monotonic() > deadline:
                raise RunError(f"{', '.join(running)} did not end within {timeout_s:g} s")
            time.sleep(poll_s)
        self.check()

    def wait_for_file(self, path: Path, child: ChildProcess, *, timeout_s: float) -> str:
        """The text of the file that `child` writes when it is ready. Raises RunError at the deadline."""
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            self.check()
            if child.process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"{child.name} was not ready within {timeout_s:g} s; see {child.log}")
            time.sleep(0.05)
        return path.read_text()

    def kill(self, child: ChildProcess) -> None:
        """Send KILL to the child and its descendants; does not wait, see `is_gone`."""
        _signal_group(child, signal.SIGKILL)

    def terminate(self, child: ChildProcess) -> None:
        """Send TERM to the child and its descendants; does not wait."""
        _signal_group(child, signal.SIGTERM)
        _signal_group(child, signal.SIGCONT)  # TERM does not reach a stopped process

    def is_gone(self, child: ChildProcess) -> bool:
        """Whether no process of the child's group runs any more, so its ports and GPU memory are free. Then the child
        is forgotten."""
        if child.process.poll() is None or _group_runs(child.process.pid):
            return False
        self._children.remove(child)  # another process may get its pid from here on
        return True

    def end_all(self) -> None:
        """Send TERM to every child's group and KILL after GRACE_S, or at once after another signal; returns when all
        have ended.

        Children that save come first, while the others still answer, and get their grace time. If one of them has
        ended, the rest cannot save and get none.
        """
        saving = [child for child in self._children if child.saves]
        try:
            if saving and all(child.process.poll() is None for child in saving):
                names = ", ".join(child.name for child in saving)
                print(f"{names} may take {self._save_grace_s:g} s to save", file=sys.stderr, flush=True)
                self._end(saving, self._save_grace_s + SAY_S)
            others = [child for child in self._children if child not in saving or child.process.poll() is None]
            self._end(others, GRACE_S)
        except KeyboardInterrupt:
            for child in self._children:
                self.kill(child)
                child.process.wait()
            raise
        finally:
            self._children.clear()

    def _end(self, children: Sequence[ChildProcess], grace_s: float) -> None:
        for child in children:
            self.terminate(child)
        deadline = time.monotonic() + grace_s
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{child.name} did not end within {grace_s:g} s: killed", file=sys.stderr, flush=True)
            self.kill(child)  # the rest of its group
            child.process.wait()

    def fail(self, child: ChildProcess) -> NoReturn:
        """End all children because this one has failed. Raises RunError with its error message, or exits with its code
        if it has printed the message itself or the user made a mistake."""
        if child.process.poll() == EXIT_BUDGET:
            child = self._printing_rank(child)
        code, how = child.process.poll(), child.ended()
        told = self._last_lines(child)
        sentence = next((line.removeprefix("error: ") for line in reversed(told) if line.startswith("error: ")), None)
        if code == EXIT_USER:
            if sentence:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
            self.end_all()
            sys.exit(EXIT_USER)
        if code in (EXIT_RUN, EXIT_BUDGET) and child.log is None:  # it has printed its message itself
            self.end_all()
            sys.exit(code)
        if code == EXIT_INTERRUPTED and child.saves:  # a signal to this rank only; it has saved
            print(f"{child.name} was interrupted", file=sys.stderr, flush=True)
            self.end_all()
            sys.exit(code)
        if sentence is None and told:
            print("\n".join(f"  {child.name}| {line}" for line in told), file=sys.stderr, flush=True)
        where = f"; see {child.log}" if child.log is not None else ""
        error = BudgetSpent if code == EXIT_BUDGET else RunError
        raise error(f"{child.name} ended with {how}{': ' + sentence if sentence else ''}{where}")

    def _last_lines(self, child: ChildProcess) -> list[str]:
        return tail(child.log) if child.log is not None else []

    def _printing_rank(self, child: ChildProcess) -> ChildProcess:
        """All ranks end with exit code 3 when the budget is spent; the one without a log has printed the message, but
        may end a moment later than this one. Returns that one, or this one if the other does not end."""
        for other in self._children:
            if other.saves and other.log is None:
                try:
                    other.process.wait(SAY_S)
                except subprocess.TimeoutExpired:
                    return child
                return other if other.process.returncode == EXIT_BUDGET else child
        return child


def _lasting_caches() -> dict[str, str]:
    """Caches that lie in TMPDIR by default and should outlive the run."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return {}
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    caches = Path(home, "torchinductor")
    try:
        caches.mkdir(parents=True, exist_ok=True)
    except OSError:  # a user without a home, or a home that is not writable here
        return {}
    return {"TORCHINDUCTOR_CACHE_DIR": str(caches)} if os.access(caches, os.W_OK) else {}


def _signal_group(child: ChildProcess, number: signal.Signals) -> None:
    try:
        os.killpg(child.process.pid, number)
    except ProcessLookupError:
        return  # the whole group has ended


def _group_runs(group: int) -> bool:
    """Whether a process of the group still runs. Zombies do not count: their parent may never collect them."""
    return any(process.group == group and process.state not in "ZX" for process in all_processes())
