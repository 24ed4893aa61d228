"""The launcher's connection to the node agents (agent.py): who is there, what runs where, what should change.

    link = JobLink("10.0.0.1:*", key, ["gpu01", "gpu02"])
    link.wait_until_joined(lambda hello: Welcome(...), timeout_s=JOIN_S)
    link.send("gpu02", Start("engine-0", life=0, ...));  link.role("gpu02", "engine-0")

`poll` never waits; call it in the loop that watches the run. A command is sent again every AGAIN_S until a report shows
its effect, so a message that a broken connection lost does no harm. A node without a sign of life for LOST_S is lost
for good: its agent, should it come back, is told to leave.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import zmq

from collab_megatron.errors import RunError, UserError
from collab_megatron.wire import job
from collab_megatron.wire.curve import REFUSED, encrypt_server, watch_refusals
from collab_megatron.wire.dropped import Dropped
from collab_megatron.wire.sealed import HALF, MAX_BODY, NOBODY, Channel, Refused, new_half, parts_of

JOIN_S = 120.0  # srun on hundreds of nodes, cold file systems
LOST_S = 20.0  # above a pause of the network or of a busy node
AGAIN_S = 2.0
POLL_S = 0.05
MOST_AT_ONCE = 1000  # messages of one poll: strangers must not keep it busy

Command = job.Start | job.Kill | job.End | job.Put


@dataclass
class _Node:
    """What the launcher knows of one node."""

    name: str
    half: bytes = b""  # of its agent; empty until it has joined
    channel: Channel | None = None
    peer: bytes = b""  # ZeroMQ's identity of its newest connection
    hello: job.Hello | None = None
    welcomed: bool = False
    report: job.Report = field(default_factory=job.Report)
    heard: float = 0.0
    lost: str = ""
    commands: dict[tuple[str | int, ...], Command] = field(default_factory=dict)  # without an effect yet
    again_at: float = 0.0


class JobLink:
    """For one thread. `close` at the end."""

    def __init__(
        self,
        bind: str,
        key: bytes,
        nodes: Sequence[str],
        *,
        lost_s: float = LOST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """bind: HOST:PORT, where the port may be `*`. Raises UserError if it cannot be opened."""
        self._key, self._lost_s, self._clock = key, lost_s, clock
        self._nodes = {name: _Node(name) for name in nodes}
        self._hellos: dict[bytes, Channel] = {}  # agent's half -> the channel of its Hello
        self._versions: Counter[str] = Counter()  # of files
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._refusals: zmq.Socket[bytes] = watch_refusals(self._socket)
        self._socket.linger = 1000
        self._socket.maxmsgsize = 2 * MAX_BODY
        encrypt_server(self._socket, key, "job")
        try:
            self._socket.bind(f"tcp://{bind}")
        except zmq.ZMQError as error:
            self.close()
            raise UserError(f"the launcher cannot listen at {bind}: {error.strerror}; free the address") from None
        last = cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
        self.address = last.removeprefix("tcp://")
        self.dropped = Dropped()

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._nodes)

    @property
    def lost(self) -> dict[str, str]:
        """Lost nodes and why."""
        return {node.name: node.lost for node in self._nodes.values() if node.lost}

    def hello(self, node: str) -> job.Hello | None:
        """What the agent said of its node; None until it has joined."""
        return self._nodes[node].hello

    def shared(self, node: str) -> str:
        """What the node reads in Welcome.shared_file."""
        return self._nodes[node].report.shared

    def role(self, node: str, role: str) -> job.RoleState | None:
        """The newest state of a process; None before its agent has reported it."""
        return next((state for state in self._nodes[node].report.roles if state.role == role), None)

    def send(self, node: str, command: Command) -> None:
        """Start or end a process; has its effect at once or after some polls."""
        known = self._nodes[node]
        if known.lost:
            return
        if isinstance(command, job.Put):
            known.commands["Put", command.name] = command  # in the place of an older version
        else:
            known.commands[type(command).__name__, command.role, command.life] = command
        self._tell(known, command)

    def put(self, nodes: Iterable[str], name: str, content: bytes) -> None:
        """Write a file to the temporary folder of each node; has its effect after some polls, see `has_files`."""
        self._versions[name] += 1
        for node in nodes:
            self.send(node, job.Put(name, self._versions[name], content))

    def has_files(self, node: str) -> bool:
        """Whether all files that were `put` are there. True for a lost node."""
        return not any(isinstance(command, job.Put) for command in self._nodes[node].commands.values())

    def marks(self, node: str) -> Mapping[str, str]:
        """What processes of the node have written to the folder Welcome.marks: file -> text."""
        return self._nodes[node].report.marks

    def poll(self) -> None:
        """Take what has arrived, repeat what had no effect, notice lost nodes."""
        for _ in range(MOST_AT_ONCE):
            if not self._socket.poll(0):
                break
            self._take(self._socket.recv_multipart())
        while self._refusals.poll(0):
            self._refusals.recv_multipart()
            self.dropped[REFUSED] += 1
        now = self._clock()
        for node in self._nodes.values():
            if not node.heard or node.lost:  # wait_until_joined has its own deadline
                continue
            if now - node.heard > self._lost_s:
                node.lost = f"no sign of life for {self._lost_s:g} s"
                node.commands.clear()
            elif node.commands and now >= node.again_at:
                node.again_at = now + AGAIN_S
                for command in node.commands.values():
                    self._tell(node, command)

    def wait_for_hellos(self, *, timeout_s: float) -> None:
        """Until every agent has said what its node has. Raises RunError at the deadline."""
        self._wait_for_all(lambda node: node.hello is not None, timeout_s)

    def wait_until_joined(self, welcome: Callable[[job.Hello], job.Welcome], *, timeout_s: float) -> None:
        """Until every agent has been welcomed and has sent a report. Raises RunError at the deadline."""

        def joined(node: _Node) -> bool:
            if node.hello is not None and not node.welcomed:
                self._tell(node, welcome(node.hello))
                node.welcomed = True
            return bool(node.heard)

        self._wait_for_all(joined, timeout_s)

    def _wait_for_all(self, done: Callable[[_Node], bool], timeout_s: float) -> None:
        deadline = self._clock() + timeout_s
        while missing := [name for name, node in self._nodes.items() if not done(node)]:
            self.poll()
            if self._clock() > deadline:
                some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                raise RunError(
                    f"{len(missing)} of {len(self._nodes)} nodes did not report within {timeout_s:g} s: {some}; see "
                    "the output of srun in the job's log"
                )
            self._socket.poll(int(POLL_S * 1000))

    def wait_for(self, done: Callable[[], bool], *, timeout_s: float) -> bool:
        """Poll until `done`; False at the deadline."""
        deadline = self._clock() + timeout_s
        while not done():
            if self._clock() > deadline:
                return False
            self._socket.poll(int(POLL_S * 1000))
            self.poll()
        return True

    def say_bye(self, *, timeout_s: float) -> None:
        """Tell all agents to end their processes and leave; waits until they have heard it."""
        for node in self._nodes.values():
            node.commands.clear()
        deadline, again = self._clock() + timeout_s, 0.0
        while staying := [node for node in self._nodes.values() if node.channel and not self._has_left(node)]:
            if self._clock() > deadline:
                return  # agents without a launcher leave by themselves
            if self._clock() >= again:
                again = self._clock() + AGAIN_S
                for node in staying:
                    self._tell(node, job.Bye())
            self._socket.poll(int(POLL_S * 1000))
            self.poll()

    def close(self) -> None:
        self._socket.close()
        self._refusals.close()
        self._context.term()

    def _has_left(self, node: _Node) -> bool:
        return bool(node.lost) or node.report.leaving

    def _tell(self, node: _Node, message: job.Message) -> None:
        if node.channel is None:
            return  # `poll` repeats it once the agent is there
        try:
            self._socket.send_multipart([node.peer, *node.channel.seal(job.encode(message))], zmq.NOBLOCK)
        except zmq.Again:
            return  # its queue is full: said again later

    def _take(self, frames: list[bytes]) -> None:
        peer, *sealed = frames
        try:
            session = parts_of(sealed)[0]
            if session[HALF:] == NOBODY:
                self._take_hello(peer, session, sealed)
                return
            node = next(
                (node for node in self._nodes.values() if node.channel is not None and node.channel.session == session),
                None,
            )
            if node is None or node.channel is None:
                raise Refused("of another session")
            message = job.from_agent(node.channel.open(sealed))
            if not isinstance(message, job.Report):
                raise Refused("unknown")
        except Refused as reason:
            self.dropped[str(reason)] += 1
            return
        node.peer, node.heard = peer, self._clock()
        if node.lost:
            self._tell(node, job.Bye())
            return
        node.report = message
        done = [name for name, command in node.commands.items() if _has_effect(command, message)]
        for name in done:
            del node.commands[name]
        self._tell(node, job.Heard())

    def _take_hello(self, peer: bytes, session: bytes, sealed: list[bytes]) -> None:
        half = session[:HALF]
        channel = self._hellos.get(half) or Channel(self._key, session, "launcher")
        message = job.from_agent(channel.open(sealed))
        if not isinstance(message, job.Hello):
            raise Refused("unknown")
        node = self._nodes.get(message.node)
        if node is None:
            raise Refused("of a node that is not of this job")
        if node.half and node.half != half:
            raise Refused("of a second agent of a node")
        self._hellos[half] = channel
        node.half, node.hello, node.peer = half, message, peer
        if node.channel is None:
            node.channel = Channel(self._key, half + new_half(), "launcher")
        if not node.heard:  # no report yet: the Welcome was lost, or is still to be sent
            node.welcomed = False


def _has_effect(command: Command, report: job.Report) -> bool:
    if isinstance(command, job.Put):
        return report.files.get(command.name, 0) >= command.version
    state = next((state for state in report.roles if state.role == command.role), None)
    if state is None or state.life < command.life:
        return not isinstance(command, job.Start)  # nothing to end
    if isinstance(command, job.Start) or state.life > command.life:
        return True
    return state.gone
