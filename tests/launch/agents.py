"""Node agents in threads of the test, and the launcher's end of their connection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.launch import agent as agent_module
from collab_megatron.launch import supervisor
from collab_megatron.launch.agent import Agent
from collab_megatron.launch.job_link import JobLink
from collab_megatron.wire.job import Hello, RoleState, Start, Welcome

KEY = bytes(range(32))
WAIT_S = 30.0


@dataclass
class Running:
    """An agent in a thread."""

    agent: Agent
    thread: threading.Thread
    codes: list[int]

    def code(self) -> int:
        """Its exit code; waits for it."""
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.codes[0]


class Job:
    """A launcher with agents of the names `nodes`."""

    def __init__(self, folder: Path, nodes: tuple[str, ...], *, lost_s: float, orphan_s: float) -> None:
        self.folder, self.orphan_s = folder, orphan_s
        self.link = JobLink("127.0.0.1:*", KEY, nodes, lost_s=lost_s)
        self.agents = {name: self.start_agent(name) for name in nodes}

    def start_agent(self, name: str, key: bytes = KEY) -> Running:
        agent = Agent(name, self.link.address, key, orphan_s=self.orphan_s)
        codes: list[int] = []

        def run() -> None:
            try:
                codes.append(agent.run())
            finally:
                agent.close()

        thread = threading.Thread(target=run, name=name)
        thread.start()
        return Running(agent, thread, codes)

    def welcome(self, hello: Hello) -> Welcome:
        return Welcome(
            logs_dir=str(self.folder / hello.node),
            umask="077",
            stopped_timeout_s=1.0,
            save_grace_s=1.0,
            files={"secret": b"of the node"},
            shared_file=str(self.folder / "shared"),
        )

    def join(self) -> None:
        self.link.wait_until_joined(self.welcome, timeout_s=WAIT_S)

    def start(self, node: str, code: str, *arguments: str, role: str = "child", life: int = 0, **more: Any) -> None:
        """A Python process with this code. more: further fields of Start."""
        self.link.send(node, Start(role, life, ("{python}", "-c", code, *arguments), **more))

    def state(self, node: str, role: str = "child") -> RoleState:
        found = self.link.role(node, role)
        assert found is not None
        return found

    def until_ended(self, node: str, role: str = "child", life: int = 0) -> RoleState:
        def ended() -> bool:
            state = self.link.role(node, role)
            return state is not None and state.life == life and state.gone

        assert self.link.wait_for(ended, timeout_s=WAIT_S), self.link.role(node, role)
        return self.state(node, role)

    def until_ready(self, node: str, role: str = "child", life: int = 0) -> RoleState:
        def ready() -> bool:
            state = self.link.role(node, role)
            return state is not None and state.life == life and bool(state.address)

        assert self.link.wait_for(ready, timeout_s=WAIT_S), self.link.role(node, role)
        return self.state(node, role)


@contextmanager
def running_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *nodes: str, lost_s: float = 20.0, orphan_s: float = 60.0
) -> Iterator[Job]:
    # a thread has no signal handlers, and the umask is the whole process's
    monkeypatch.setattr(supervisor, "end_at_signals", lambda *numbers: None)
    monkeypatch.setattr(agent_module, "keep_from_others", lambda umask: None)
    job = Job(folder, nodes, lost_s=lost_s, orphan_s=orphan_s)
    try:
        yield job
    finally:
        job.link.say_bye(timeout_s=WAIT_S)
        job.link.close()
        for running in job.agents.values():
            running.agent._orphan_s = running.agent._join_s = 0.0  # if it has not heard the Bye
            running.thread.join(WAIT_S)
            assert not running.thread.is_alive()
