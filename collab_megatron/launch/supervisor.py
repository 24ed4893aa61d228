"""Child processes that never outlive us: own process group each, death signal, one supervisor that ends them all.

An essential child's failure ends everything; of the others (servers that are started again) whoever started them takes
care. A child that a signal has stopped counts as failed after a while (stopped.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from collab_megatron.errors import EXIT_BUDGET, EXIT_DEFECT, EXIT_INTERRUPTED, EXIT_RUN, EXIT_USER, RunError
from collab_megatron.launch.scratch import ScratchFolder
from collab_megatron.launch.stopped import StoppedWatch, all_processes
from collab_megatron.signals import die_with_parent, end_at_signals

GRACE_S = 10.0  # between TERM and KILL
SAY_S = 5.0  # for those that save, on top of their grace time: they end themselves, and tell the user
TAIL_LINES = 12


@dataclass
class ChildProcess:
    """One started process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None  # None: its output goes to ours
    essential: bool = True  # its failure ends everything
    restarted: bool = False  # one that a signal or a defect ended is started again by its starter
    saves: bool = False  # at TERM it saves together with the others that do, and ends
    hung: str | None = None  # why it must be killed though it runs; its starter looks here

    def ended(self) -> str | None:
        """How the process itself ended ("exit code 1", "signal SIGKILL"); None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def comes_again(self) -> bool:
        """Whether it ended in a way after which its starter starts it again."""
        code = self.process.poll() or 0
        return self.restarted and (code < 0 or code == EXIT_DEFECT)


class Supervisor:
    """Starts children and ends all of them, whatever happens. Use as a context manager.

    It gives them a temporary folder (scratch.py), which goes when it ends, and with it the logs where no `logs_dir` is
    given. `held`: open files that every child inherits, whose locks (flock) thereby last as long as one of them runs.
    `stopped_timeout_s`: a child that is stopped for so long has failed; None: nobody looks.
    `save_grace_s`: between TERM and KILL for children that save (train.save_grace_s).
    """

    def __init__(
        self,
        logs_dir: Path | None = None,
        held: Sequence[int] = (),
        *,
        stopped_timeout_s: float | None = None,
        save_grace_s: float = 0.0,
    ) -> None:
        self._logs_dir = logs_dir or Path()
        self._keeps_logs = logs_dir is not None
        self._held = tuple(held)
        self._save_grace_s = save_grace_s
        self._scratch: ScratchFolder | None = None
        self._children: list[ChildProcess] = []
        self._stopped = None if stopped_timeout_s is None else StoppedWatch(stopped_timeout_s)

    def __enter__(self) -> Supervisor:
        self._logs_dir.mkdir(parents=True, exist_ok=True)
        self._scratch = ScratchFolder.create()
        if not self._keeps_logs:
            self._logs_dir = self._scratch.folder
        # Ctrl-C as well where a second one would cut a save short; asyncio, which an evaluation runs, has its own way
        end_at_signals(*((signal.SIGINT,) if self._save_grace_s else ()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self.note_shared_memory()
            finally:
                self.end_all()
        finally:  # a second signal ends the children at once, and raises
            if self._scratch is not None:
                self._scratch.remove()
                self._scratch = None

    @property
    def scratch(self) -> Path:
        """The temporary folder of this run, mode 0700; TMPDIR of every child."""
        assert self._scratch is not None, "entered, and not left yet"
        return self._scratch.folder

    def note_shared_memory(self) -> None:
        """Write down what the children have in /dev/shm, for the case of a kill -9 of everything."""
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
    ) -> ChildProcess:
        """Start `argv` with `env` on top of ours without `unset`; output to LOGS/name.log, or to our own if `show`."""
        log = None if show else self._logs_dir / f"{name}.log"
        # SGLang writes its keys at --log-level info: for no other eyes, whatever the umask is
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
                env={**ours, **env},
                pass_fds=held,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink and subprocess.STDOUT,
                start_new_session=True,  # its own group: one kill reaches whatever it starts
                preexec_fn=die_with_parent,
            )
        finally:
            if sink is not None:
                sink.close()
        child = ChildProcess(name, process, log, essential, restarted, saves)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raise RunError (or exit with 2 for a user's mistake) if an essential child has ended with an error, or has
        been stopped for too long."""
        self._look_for_stopped()
        if self._scratch is not None:
            self._scratch.stay_young()
        for child in self._children:
            code = child.process.poll()
            if child.essential and code and not child.comes_again():
                self.fail(child)

    def _look_for_stopped(self) -> None:
        """Those that are started again are only marked; their starter kills them."""
        if self._stopped is None:
            return
        running = {child.process.pid: child for child in self._children if child.process.poll() is None}
        for group, why in self._stopped.over(running).items():
            child = running[group]
            if child.essential and not child.restarted:
                raise RunError(f"{child.name} is given up: {why}")
            child.hung = why

    def wait_for(
        self,
        children: Sequence[ChildProcess],
        *,
        timeout_s: float | None = None,
        poll_s: float = 0.1,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Until all `children` have ended well; any essential child's failure ends everything. `tick` is called in
        between and must not take long.

        Without `timeout_s` it takes as long as they do: training has no deadline. Raises RunError at the deadline.
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
        """The text of a file that `child` writes when it is ready. Raises RunError at the deadline."""
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            self.check()
            if child.process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"{child.name} was not ready within {timeout_s:g} s; see {child.log}")
            time.sleep(0.05)
        return path.read_text()

    def kill(self, child: ChildProcess) -> None:
        """KILL to the child and whatever it started; does not wait, see `is_gone`."""
        _signal_group(child, signal.SIGKILL)

    def is_gone(self, child: ChildProcess) -> bool:
        """Whether nobody of the child's group runs any more: what it held (ports, GPU memory) is free. It is forgotten
        then."""
        if child.process.poll() is None or _group_runs(child.process.pid):
            return False
        self._children.remove(child)  # its number may be given to another process from now on
        return True

    def end_all(self) -> None:
        """TERM to every child's group, KILL after GRACE_S, or at once when we are signalled again; returns when none is
        left.

        Those that save come first, while their peers still answer, and get their grace time, unless one of them has
        ended: the others cannot save without.
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
                _signal_group(child, signal.SIGKILL)
                child.process.wait()
            raise
        finally:
            self._children.clear()

    def _end(self, children: Sequence[ChildProcess], grace_s: float) -> None:
        for child in children:
            _signal_group(child, signal.SIGTERM)
            _signal_group(child, signal.SIGCONT)  # TERM does not reach a stopped process
        deadline = time.monotonic() + grace_s
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{child.name} did not end within {grace_s:g} s: killed", file=sys.stderr, flush=True)
            _signal_group(child, signal.SIGKILL)  # whatever is left of its group
            child.process.wait()

    def fail(self, child: ChildProcess) -> NoReturn:
        """End everything because of a child that has ended. Raises RunError with its sentence, or exits with its code
        where it has told the user itself or the mistake is the user's."""
        code, how = child.process.poll(), child.ended()
        told = _tail(child.log) if child.log is not None else []
        sentence = next((line.removeprefix("error: ") for line in reversed(told) if line.startswith("error: ")), None)
        if code == EXIT_USER:
            if sentence:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
            self.end_all()
            sys.exit(EXIT_USER)
        if code in (EXIT_RUN, EXIT_BUDGET) and child.log is None:  # it has told the user itself
            self.end_all()
            sys.exit(code)
        if code == EXIT_INTERRUPTED and child.saves:  # somebody has signalled it, and not us; it has saved
            print(f"{child.name} was interrupted", file=sys.stderr, flush=True)
            self.end_all()
            sys.exit(code)
        if sentence is None and told:
            print("\n".join(f"  {child.name}| {line}" for line in told), file=sys.stderr, flush=True)
        where = f"; see {child.log}" if child.log is not None else ""
        raise RunError(f"{child.name} ended with {how}{': ' + sentence if sentence else ''}{where}")


def _lasting_caches() -> dict[str, str]:
    """Caches that lie in TMPDIR unless told otherwise, and are worth more than one run."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return {}
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    caches = Path(home, "torchinductor")
    try:
        caches.mkdir(parents=True, exist_ok=True)
    except OSError:  # a container's user, a home that this node may not write
        return {}
    return {"TORCHINDUCTOR_CACHE_DIR": str(caches)} if os.access(caches, os.W_OK) else {}


def _signal_group(child: ChildProcess, number: signal.Signals) -> None:
    try:
        os.killpg(child.process.pid, number)
    except ProcessLookupError:
        return  # nobody of the group is left


def _group_runs(group: int) -> bool:
    """Whether a process of the group still runs; zombies do not: whoever inherited them may never collect them."""
    return any(process.group == group and process.state not in "ZX" for process in all_processes())


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
