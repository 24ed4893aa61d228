"""Messages of launcher and node agents (launch/job_link.py, launch/agent.py), inside sealed frames (sealed.py).

The agent's report has the whole state of its node, and every command is idempotent by role and life, so a lost message
needs no special case: reports come every few seconds, and the launcher repeats a command until a report shows its
effect. Every text and list has a largest size. Nothing is unpickled.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from collab_megatron.wire.sealed import Refused

MOST_ROLES = 256
MARK_CHARACTERS = 1000
TAIL_BYTES = 2048
"""The most bytes of a log's end in a report."""

Role = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9._-]{0,63}$")]  # engine-3, trainer-12: also the name of its log
Node = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, Meta(max_length=8192)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0, le=86400)]
Mark = Annotated[str, Meta(max_length=MARK_CHARACTERS)]


class Message(msgspec.Struct, frozen=True, tag=str.lower, forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(Message, frozen=True):
    """The agent's first message, sent again until it gets a Welcome."""

    node: Node  # as Slurm names it
    address: Text  # of the node, as the launcher reaches it
    cores: Count
    gpus: Annotated[tuple[Text, ...], Meta(max_length=64)]  # in the form of CUDA_VISIBLE_DEVICES
    package: Text  # version of this package
    boot: Text  # the kernel's boot id: equal for agents on one machine
    ports: Annotated[tuple[Annotated[int, Meta(gt=0, lt=65536)], ...], Meta(max_length=64)] = ()  # free ones


class RoleState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process that an agent was told to start. Example: RoleState("engine-0", 1, pid=4711, address="http://...")"""

    role: Role
    life: Count
    pid: Count = 0  # 0: it was not started, see `refused`
    address: Text = ""  # its URL, or the content of its ready file; empty until it is ready
    hung: Text = ""  # why it must be killed although it runs
    code: int | None = None  # exit code, negative for a signal; None: it runs
    gone: bool = False  # no process of its group runs any more
    tail: Text = ""  # of its log, once it has ended
    refused: Text = ""  # why it could not be started


class Report(Message, frozen=True):
    """The state of a node."""

    roles: Annotated[tuple[RoleState, ...], Meta(max_length=MOST_ROLES)] = ()
    shared: Text = ""  # what the agent reads in Welcome.shared_file; empty: nothing yet
    files: dict[FileName, Count] = {}  # newest version of each file that came as a Put
    marks: Annotated[dict[FileName, Mark], Meta(max_length=MOST_ROLES)] = {}  # the files in Welcome.marks
    leaving: bool = False  # after a Bye


class Welcome(Message, frozen=True):
    """The answer to a Hello."""

    logs_dir: Text
    umask: Annotated[str, Meta(pattern=r"^[0-7]{3}$")]
    stopped_timeout_s: Seconds
    save_grace_s: Seconds
    # written to the node's temporary folder with mode 600
    files: dict[FileName, Annotated[bytes, Meta(max_length=2**18)]] = {}
    shared_file: Text = ""  # a file that the launcher has written to the run's folder
    marks: Text = ""  # folder in the node's temporary folder; what processes write there goes to the launcher
    env: dict[Text, Text] = {}  # of every process


class Start(Message, frozen=True):
    """Start a process. In arguments, variables, URL and ready file the agent replaces {python} by its interpreter,
    {scratch} by its temporary folder, {address} by its node's address, {interface} by the name of the network interface
    with that address, and {port:NAME} by a free port."""

    role: Role
    life: Count
    argv: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=256)]
    env: dict[Text, Text] = {}
    unset: tuple[Text, ...] = ()
    show: bool = False  # output to the agent's own, not to a log
    saves: bool = False  # at TERM it saves together with others
    probe_url: Text = ""  # ready when URL/health answers; the URL is then its address
    ready_file: Text = ""  # or when this file is there; its content is then its address


class Kill(Message, frozen=True):
    """KILL to a process and its descendants."""

    role: Role
    life: Count


class End(Message, frozen=True):
    """TERM to a process, KILL after the grace time."""

    role: Role
    life: Count
    grace_s: Seconds


class Put(Message, frozen=True):
    """Write a file to the node's temporary folder, with mode 600: a reader sees the old content or the new one."""

    name: FileName
    version: Annotated[int, Meta(ge=1)]
    content: Annotated[bytes, Meta(max_length=2**18)]


class Heard(Message, frozen=True):
    """Sign of life of the launcher."""


class Bye(Message, frozen=True):
    """End all processes and leave."""


FromAgent = Hello | Report
FromLauncher = Welcome | Start | Kill | End | Put | Heard | Bye
M = TypeVar("M")

_AGENT: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)
_LAUNCHER: msgspec.msgpack.Decoder[FromLauncher] = msgspec.msgpack.Decoder(FromLauncher)


def encode(message: Message) -> bytes:
    return msgspec.msgpack.encode(message)


def from_agent(body: bytes) -> FromAgent:
    """Raises Refused."""
    return _decoded(_AGENT, body)


def from_launcher(body: bytes) -> FromLauncher:
    """Raises Refused."""
    return _decoded(_LAUNCHER, body)


def _decoded(decoder: msgspec.msgpack.Decoder[M], body: bytes) -> M:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        raise Refused("unknown") from None
