"""Node agent: starts, watches and ends the processes of one node on the launcher's word. It has no plan and no config.

    srun --ntasks-per-node=1 python -m collab_megatron.launch.agent --launcher HOST:PORT [--name NODE] < KEY

The key comes on standard input, which srun copies to every task: it is on no command line, in no environment and in no
file of a shared folder. The agent connects to the launcher (job_link.py), so that it needs no open port. Messages are
those of wire/job.py. After ORPHAN_S without a sign of life of the launcher the agent ends its processes and leaves:
nothing outlives the launcher.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from collab_megatron import __version__
from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import keep_from_others, publish_secret
from collab_megatron.launch.child_process import ChildProcess, tail
from collab_megatron.launch.node import visible_gpus
from collab_megatron.launch.ports import address_towards, free_port, interface_of
from collab_megatron.launch.readiness import ReadinessProbe
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.launch.threads import usable_cores
from collab_megatron.signals import die_with_parent
from collab_megatron.wire import job
from collab_megatron.wire.curve import encrypt_client
from collab_megatron.wire.dropped import Dropped
from collab_megatron.wire.sealed import MAX_BODY, NOBODY, Channel, Refused, new_half, parts_of, read_key

BEAT_S = 2.0  # between two reports without news
ASK_S = 0.5  # between two requests to a server that starts
POLL_S = 0.05
ORPHAN_S = 60.0  # above the launcher's LOST_S: both sides agree that this node is lost
JOIN_S = 900.0  # the launcher checks config, data and model before it lets the agents in
PORTS = 40  # free ports that the launcher may give away: for the ranks, and for servers across nodes
_PLACE = re.compile(r"\{(python|scratch|address|interface|port:[a-z0-9-]{1,32})\}")


@dataclass
class _Process:
    """One life of a role."""

    start: job.Start
    child: ChildProcess | None = None
    probe: ReadinessProbe | None = None
    probe_url: str = ""
    ready_file: Path | None = None
    address: str = ""
    refused: str = ""
    last: str = ""  # lines of its log, once it has ended
    gone: bool = False
    kill_at: float | None = None  # end of the grace time after TERM
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def code(self) -> int | None:
        return None if self.child is None else self.child.process.poll()

    @property
    def runs(self) -> bool:
        return self.child is not None and not self.gone

    def state(self) -> job.RoleState:
        start, child, code = self.start, self.child, self.code
        if child is None:
            return job.RoleState(start.role, start.life, gone=True, refused=self.refused)
        return job.RoleState(
            start.role,
            start.life,
            pid=child.process.pid,
            address=self.address,
            hung=child.hung or "",
            code=code,
            gone=self.gone,
            tail=self.last,
        )


class Agent:
    """The agent of one node."""

    def __init__(
        self, node: str, launcher: str, key: bytes, *, orphan_s: float = ORPHAN_S, join_s: float = JOIN_S
    ) -> None:
        """launcher: HOST:PORT. Raises UserError if it is not an address."""
        self._node, self._launcher, self._key = node, launcher, key
        self._orphan_s, self._join_s = orphan_s, join_s
        self._half = new_half()
        self._channel = Channel(key, self._half + NOBODY, "agent")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 2000  # the last report
        self._socket.maxmsgsize = 2 * MAX_BODY
        encrypt_client(self._socket, key, "job")
        try:
            self._socket.connect(f"tcp://{launcher}")
            self._address = address_towards(launcher.rpartition(":")[0])
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise UserError(f"{node} cannot reach the launcher at {launcher}: {error.strerror}") from None
        self._heard = time.monotonic()
        self._processes: dict[str, _Process] = {}
        self._files: dict[str, int] = {}  # name -> version, of those that came as a Put
        self._marks: Path | None = None
        self._told = job.Report()
        self._tell_at = 0.0
        self.dropped = Dropped()

    def run(self) -> int:
        """Serve the launcher until it says Bye (0) or is silent for too long (1)."""
        welcome = self._join()
        if isinstance(welcome, job.Bye):
            return 0
        if welcome is None:
            print(f"{self._node}: no answer from {self._launcher} within {self._join_s:g} s", file=sys.stderr)
            return 1
        keep_from_others(welcome.umask)
        with Supervisor(
            Path(welcome.logs_dir),
            stopped_timeout_s=welcome.stopped_timeout_s or None,
            save_grace_s=welcome.save_grace_s,
            env=welcome.env,
        ) as supervisor:
            for name, content in welcome.files.items():
                publish_secret(supervisor.scratch / name, content.decode())
            self._marks = supervisor.scratch / welcome.marks if welcome.marks else None
            return self._serve(supervisor, Path(welcome.shared_file) if welcome.shared_file else None)

    def close(self) -> None:
        """Waits at most two seconds until the last report is sent."""
        self._socket.close()
        self._context.term()

    def _join(self) -> job.Welcome | job.Bye | None:
        """Say Hello until the launcher answers; None at the deadline."""
        hello = job.Hello(
            node=self._node,
            address=self._address,
            cores=usable_cores(),
            gpus=tuple(visible_gpus()),
            package=__version__,
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            ports=tuple({free_port(self._address) for _ in range(PORTS)}),
        )
        say_at = 0.0
        while time.monotonic() - self._heard < self._join_s:
            if time.monotonic() >= say_at:
                self._send(hello)
                say_at = time.monotonic() + BEAT_S
            for message in self._received():
                if isinstance(message, job.Welcome | job.Bye):
                    return message
        return None

    def _serve(self, supervisor: Supervisor, shared: Path | None) -> int:
        while True:
            for message in self._received():
                if isinstance(message, job.Bye):
                    self._send(job.Report(self._states(), leaving=True))
                    return 0
                self._obey(message, supervisor)
            if time.monotonic() - self._heard > self._orphan_s:
                print(f"{self._node}: no sign of life of the launcher for {self._orphan_s:g} s", file=sys.stderr)
                return 1
            supervisor.check()  # looks for stopped processes; none of them ends the agent
            for process in self._processes.values():
                self._look_at(process, supervisor)
            self._report(shared)

    def _report(self, shared: Path | None) -> None:
        """At news, and every BEAT_S."""
        found = job.Report(self._states(), self._told.shared, files=dict(self._files), marks=self._found_marks())
        now = time.monotonic()
        if found == self._told and now < self._tell_at:
            return
        if shared is not None and not found.shared:
            found = msgspec.structs.replace(found, shared=_first_line(shared))
        self._send(found)
        self._told, self._tell_at = found, now + BEAT_S

    def _found_marks(self) -> dict[str, str]:
        if self._marks is None or not self._marks.is_dir():
            return {}
        found = sorted(path for path in self._marks.iterdir() if not path.name.startswith("."))
        return {path.name: path.read_text(errors="replace")[: job.MARK_CHARACTERS] for path in found[-job.MOST_ROLES :]}

    def _states(self) -> tuple[job.RoleState, ...]:
        return tuple(process.state() for process in self._processes.values())

    def _obey(self, message: job.FromLauncher, supervisor: Supervisor) -> None:
        if isinstance(message, job.Start):
            self._start(message, supervisor)
        elif isinstance(message, job.Put):
            if message.version > self._files.get(message.name, 0):
                publish_secret(supervisor.scratch / message.name, message.content.decode(errors="replace"))
                self._files[message.name] = message.version
        elif isinstance(message, job.Kill | job.End):
            process = self._processes.get(message.role)
            if process is None or process.child is None or not process.runs or process.start.life != message.life:
                return  # it has ended, or is another one
            if isinstance(message, job.Kill):
                supervisor.kill(process.child)
            elif process.kill_at is None:
                supervisor.terminate(process.child)
                process.kill_at = time.monotonic() + message.grace_s

    def _start(self, start: job.Start, supervisor: Supervisor) -> None:
        """Once for each life; the launcher repeats itself."""
        earlier = self._processes.get(start.role)
        if earlier is not None and (start.life <= earlier.start.life or earlier.runs):
            return
        process = self._processes[start.role] = _Process(start)
        try:
            argv = [self._filled(text, process, supervisor) for text in start.argv]
            env = {name: self._filled(value, process, supervisor) for name, value in start.env.items()}
            process.probe_url = self._filled(start.probe_url, process, supervisor)
            if start.ready_file:
                process.ready_file = Path(self._filled(start.ready_file, process, supervisor))
                process.ready_file.unlink(missing_ok=True)  # of an earlier life
            process.child = supervisor.start(
                start.role, argv, env, show=start.show, essential=False, saves=start.saves, unset=start.unset
            )
        except (OSError, RunError, ValueError) as error:  # no such program, full disk, no port, a zero byte
            process.refused = f"{self._node}: {start.role} could not be started: {error}"[:1000]
            return
        if process.probe_url:
            process.probe = ReadinessProbe(process.probe_url, every_s=ASK_S)

    def _filled(self, text: str, process: _Process, supervisor: Supervisor) -> str:
        """The text with this node's values for {python}, {scratch}, {address}, {interface} and {port:NAME}."""

        def value(found: re.Match[str]) -> str:
            name = found[1]
            if name.startswith("port:"):
                if name not in process.ports:
                    process.ports[name] = free_port(self._address)
                return str(process.ports[name])
            if name == "interface":
                return interface_of(self._address)
            return {"python": sys.executable, "scratch": str(supervisor.scratch), "address": self._address}[name]

        return _PLACE.sub(value, text)

    def _look_at(self, process: _Process, supervisor: Supervisor) -> None:
        """Readiness, the end of a grace time, the end of the process."""
        if process.child is None or process.gone:
            return
        if process.kill_at is not None and time.monotonic() > process.kill_at:
            supervisor.kill(process.child)
            process.kill_at = float("inf")
        if process.code is not None:
            process.gone = supervisor.is_gone(process.child)
            process.last = _last_lines(process.child)
            if process.probe is not None:
                process.probe.close()
                process.probe = None
        elif process.probe is not None and process.probe.answers():
            process.address, process.probe = process.probe_url, None
            supervisor.note_shared_memory()
        elif process.ready_file is not None and not process.address and process.ready_file.exists():
            process.address = process.ready_file.read_text().strip()[:1000]

    def _send(self, message: job.Message) -> None:
        """Dropped while too many wait for a connection: the next report has the whole state."""
        try:
            self._socket.send_multipart(self._channel.seal(job.encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            return

    def _received(self) -> Iterator[job.FromLauncher]:
        """Messages of the launcher; waits at most POLL_S for the first one."""
        if not self._socket.poll(int(POLL_S * 1000)):
            return
        while self._socket.poll(0):
            frames = self._socket.recv_multipart()
            try:
                message = job.from_launcher(self._opened(frames))
            except Refused as reason:
                self.dropped[str(reason)] += 1
                continue
            self._heard = time.monotonic()
            yield message

    def _opened(self, frames: Sequence[bytes]) -> bytes:
        """The body. The first message of the launcher decides the session."""
        session = parts_of(frames)[0]
        if self._channel.session != self._half + NOBODY or not session.startswith(self._half):
            return self._channel.open(frames)
        joined = Channel(self._key, session, "agent")
        body = joined.open(frames)
        self._channel = joined
        return body


def _last_lines(child: ChildProcess) -> str:
    last = "\n".join(tail(child.log)) if child.log is not None else ""
    return last.encode()[-job.TAIL_BYTES :].decode(errors="ignore")


def _first_line(file: Path) -> str:
    """Of the launcher's file; empty while it is not visible here. Opened again each time: a network file system may
    show a new file late."""
    try:
        with file.open(errors="replace") as opened:
            return opened.readline(200).strip()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", required=True, metavar="HOST:PORT")
    parser.add_argument("--name", help="of this node; by default as Slurm names it")
    args = parser.parse_args()
    die_with_parent()
    name = args.name or os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    agent = Agent(name, args.launcher, read_key(sys.stdin.read(200), "standard input"))
    try:
        code = agent.run()
    finally:
        agent.close()
    sys.exit(code)


if __name__ == "__main__":
    run_cli(main)
