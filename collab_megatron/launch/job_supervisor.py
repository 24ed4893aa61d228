"""Supervisor of children on the nodes of a job: the launcher's word, the agents' hands (agent.py, job_link.py).

It has the interface of supervisor.py, and so the code that starts, watches and ends the parts of a run is the same on
one node and on many. What differs: paths, addresses and ports of a node are words in braces, which its agent replaces;
files for the children go through the agents, because a shared file system may show a change late; a child of a node
that is lost counts as killed.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from collab_megatron.errors import EXIT_RUN, RunError
from collab_megatron.files import publish_text
from collab_megatron.launch.child_process import NOT_SHOWN, ChildProcess, Ready
from collab_megatron.launch.job_link import JobLink
from collab_megatron.launch.readiness import Readiness
from collab_megatron.launch.supervisor import GRACE_S, Supervisor
from collab_megatron.wire.job import End, Kill, RoleState, Start, Welcome

JOIN_S = 60.0  # the agents have said Hello before
SHARED_S = 60.0  # until every node sees a new file of run.dir
FILES_S = 60.0
BYE_S = 10.0
NOTICE_S = 15.0  # on top of a grace time: until the report that a process has ended is here
SCRATCH = Path("{scratch}")
CONDEMNED = "condemned"  # RosterFolder's markers, in the scratch folder


class RemoteProcess:
    """One life of a role on a node."""

    def __init__(self, link: JobLink, node: str, role: str, life: int) -> None:
        self.node, self.role, self.life = node, role, life
        self.returncode: int | None = None
        self._link = link

    @property
    def state(self) -> RoleState | None:
        """The newest report of this life; None before the first."""
        state = self._link.role(self.node, self.role)
        return state if state is not None and state.life == self.life else None

    @property
    def lost(self) -> str:
        """Why its node is lost; empty while it is not."""
        why = self._link.lost.get(self.node)
        return f"{self.node} is lost ({why})" if why else ""

    @property
    def gone(self) -> bool:
        newest = self._link.role(self.node, self.role)
        if self.lost:
            return True
        # the agent starts the next life when this one is gone
        return newest is not None and (newest.life > self.life or (newest.life == self.life and newest.gone))

    @property
    def pid(self) -> int:
        """On its node; 0 before its first report."""
        return self.state.pid if self.state is not None else 0

    def poll(self) -> int | None:
        """The exit code that is known now."""
        if self.returncode is None:
            state = self.state
            if state is not None and state.refused:
                self.returncode = EXIT_RUN
            elif state is not None and state.code is not None:
                self.returncode = state.code
            elif self.gone:  # with its node
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As Popen's. Raises subprocess.TimeoutExpired."""
        self._link.wait_for(lambda: self.poll() is not None, timeout_s=NOTICE_S if timeout is None else timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.role, timeout or NOTICE_S)
        return code


class _RemoteReadiness:
    """The agent asks the server."""

    def __init__(self, process: RemoteProcess) -> None:
        self._process = process

    @property
    def url(self) -> str:
        return self._process.state.address if self._process.state is not None else ""

    def answers(self) -> bool:
        return bool(self.url)

    def close(self) -> None:
        return


class JobSupervisor(Supervisor):
    """Use as a context manager; the agents have said Hello (JobLink.wait_for_hellos). Leaving it ends all children,
    and the agents leave."""

    def __init__(
        self,
        link: JobLink,
        logs_dir: Path,
        node_of: Callable[[str], str],
        *,
        umask: str,
        stopped_timeout_s: float | None = None,
        save_grace_s: float = 0.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """node_of: the node of a child, by its name. umask: of the children, in octal digits. The rest as in
        Supervisor."""
        super().__init__(logs_dir, stopped_timeout_s=None, save_grace_s=save_grace_s, env=env)
        self.link, self._node_of, self._umask = link, node_of, umask
        self._stopped_timeout_s = stopped_timeout_s
        self._lives: Counter[str] = Counter()
        self._files: dict[str, str] = {}

    def __enter__(self) -> JobSupervisor:
        """Raises RunError where a node does not join, or does not see the folder of the logs."""
        self._logs_dir.mkdir(parents=True, exist_ok=True)
        seen, text = self._logs_dir / ".seen_by_all_nodes", secrets.token_hex(8)
        publish_text(seen, text)
        try:
            self.link.wait_until_joined(lambda hello: self._welcome(seen), timeout_s=JOIN_S)
            nodes = self.link.nodes
            if not self.link.wait_for(
                lambda: all(self.link.shared(node) == text for node in nodes), timeout_s=SHARED_S
            ):
                blind = ", ".join(node for node in nodes if self.link.shared(node) != text)
                raise RunError(
                    f"run.dir is not shared: {blind} did not see {seen} within {SHARED_S:g} s: choose a run.dir on a "
                    "file system that all nodes of the job have"
                )
        except BaseException:
            self.link.say_bye(timeout_s=BYE_S)
            raise
        finally:
            seen.unlink(missing_ok=True)
        self._end_at_signals()
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.end_all()
        finally:
            self.link.say_bye(timeout_s=BYE_S)

    @property
    def scratch(self) -> Path:
        """As the children see it; the launcher has none: see `publish`."""
        return SCRATCH

    def publish(self, name: str, text: str) -> Path:
        """On every node. Children that start later find it; those that run may see it a moment later."""
        if self._files.get(name) != text:
            self._files[name] = text
            self.link.put(self.link.nodes, name, text.encode())
        return SCRATCH / name

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
        """As Supervisor's, on the node of `name`. Raises RunError where the node does not take the files."""
        node = self._node_of(name)
        if not self.link.wait_for(lambda: self.link.has_files(node), timeout_s=FILES_S):
            raise RunError(f"{node} did not take the files of the run within {FILES_S:g} s: see the job's log")
        life = self._lives[name]
        self._lives[name] += 1
        self.link.send(
            node,
            Start(
                name,
                life,
                tuple(argv),
                dict(env),
                tuple(unset),
                show=show,
                saves=saves,
                probe_url=ready.url,
                ready_file=ready.file,
            ),
        )
        log = None if show else self._logs_dir / f"{name}.log"
        process = RemoteProcess(self.link, node, name, life)
        child = ChildProcess(name, process, log, essential, restarted, saves, ready=ready)
        self._children.append(child)
        return child

    def port_for(self, host: str, taken: Collection[int | None]) -> int:
        """0: the agent chooses."""
        return 0

    def readiness(self, child: ChildProcess, *, every_s: float) -> Readiness:
        return _RemoteReadiness(_remote(child))

    def was_ready(self, child: ChildProcess) -> bool:
        state = _remote(child).state
        return state is not None and bool(state.address)

    def pass_on_addresses(self, children: Sequence[ChildProcess]) -> None:
        for child in children:
            state = _remote(child).state
            if state is not None and state.address:
                self.publish(Path(child.ready.file).name, state.address)

    def note_shared_memory(self) -> None:
        """The agents do."""

    def check(self) -> None:
        self.link.poll()
        for child in self._children:
            state = _remote(child).state
            if state is not None and state.refused and (child.essential or child.saves):
                raise RunError(state.refused)
        super().check()

    def kill(self, child: ChildProcess) -> None:
        process = _remote(child)
        self.link.send(process.node, Kill(process.role, process.life))

    def terminate(self, child: ChildProcess) -> None:
        process = _remote(child)
        self.link.send(process.node, End(process.role, process.life, self._grace_of(child)))

    def is_gone(self, child: ChildProcess) -> bool:
        self.link.poll()
        if not _remote(child).gone:
            return False
        self._children.remove(child)
        return True

    def _grace_of(self, child: ChildProcess) -> float:
        return self._save_grace_s if child.saves else GRACE_S

    def _welcome(self, seen: Path) -> Welcome:
        return Welcome(
            logs_dir=str(self._logs_dir.absolute()),
            umask=self._umask,
            stopped_timeout_s=self._stopped_timeout_s or 0.0,
            save_grace_s=self._save_grace_s,
            shared_file=str(seen.absolute()),
            marks=CONDEMNED,
            env=self._env,
        )

    def _look_for_stopped(self) -> None:
        """The agents look."""
        for child in self._children:
            process = _remote(child)
            if process.state is None or not process.state.hung or process.poll() is not None:
                continue
            if child.essential and not child.restarted:
                raise RunError(f"{child.name} on {process.node} is given up: {process.state.hung}")
            child.hung = process.state.hung

    def _last_lines(self, child: ChildProcess) -> list[str]:
        """From the report, because the log may not be visible here yet."""
        process = _remote(child)
        if process.lost:
            return [f"error: {process.lost}"]
        return process.state.tail.splitlines() if process.state is not None else []

    def _end(self, children: Sequence[ChildProcess], grace_s: float) -> None:
        for child in children:
            self.terminate(child)
        deadline = time.monotonic() + grace_s + NOTICE_S

        def done() -> bool:
            return all(_remote(child).gone for child in children)

        if self.link.wait_for(done, timeout_s=max(0.1, deadline - time.monotonic())):
            return
        for child in children:
            self.kill(child)
        self.link.wait_for(done, timeout_s=NOTICE_S)  # the agents end the rest when they leave


def _remote(child: ChildProcess) -> RemoteProcess:
    assert isinstance(child.process, RemoteProcess), "started by a JobSupervisor"
    return child.process
