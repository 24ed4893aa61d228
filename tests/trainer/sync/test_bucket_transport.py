"""The order of a sync through a bucket transport: what the servers are asked, when, and what a failure leaves."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from collab_megatron.engine.client import EngineGone
from collab_megatron.errors import RunError
from collab_megatron.trainer.convert.buckets import Bucket, TensorInfo
from collab_megatron.trainer.sync import broadcast_transport
from collab_megatron.trainer.sync.attempt import Abandoned, Attempt
from collab_megatron.trainer.sync.broadcast_transport import BroadcastTransport
from collab_megatron.trainer.sync.servers import EnginesLost, SyncServers
from tests.trainer.sync.fake_controls import ENTRIES, FakeControl, sync_servers

PLAN = [Bucket(i, 0, (), (TensorInfo(f"w{i}", (2,), torch.float32),)) for i in range(4)]
MEMBERS = ENTRIES[:2]
TIMEOUT_S = 5.0
SENT: list[Tensor] = []  # the first tensor of every bucket, in order


class Stream:
    """The trainer's side: notes what it gathers."""

    plan = mine = PLAN
    gathers = False

    def __init__(self) -> None:
        self.gathered: list[int] = []
        self.packed: list[int] = []  # the addresses of the buffers

    def gather(self, bucket: Bucket) -> None:
        self.gathered.append(bucket.number)

    def pack(self, bucket: Bucket, flat: Tensor) -> None:
        self.packed.append(flat.data_ptr())

    def free(self) -> None:
        return


class NoChecksums:
    def wants(self, names: Any) -> bool:
        return False


class Group:
    """An update group that everybody joins at once."""

    port, group = 1, object()
    closed = 0

    def __init__(self, name: str, **_: Any) -> None:
        return

    def join(self, attempt: Attempt) -> None:
        return

    def close(self) -> None:
        Group.closed += 1


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncServers]:
    def gather(every: list[Any], own: Any, group: Any) -> None:
        every[:] = [own]

    monkeypatch.setattr(broadcast_transport, "UpdateGroup", Group)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with sync_servers(tmp_path, monkeypatch, MEMBERS, timeout_s=20) as found:
        yield found


def transport_of(
    servers: SyncServers, stream: Stream, send: Callable[[Bucket], Callable[[], bool]] | None, *, renewed: bool = False
) -> Any:
    """`send` None: the transport's own."""
    grid = SimpleNamespace(
        rank=0,
        pp_rank=0,
        pp_size=1,
        is_main=True,
        world_size=1,
        device=torch.device("cpu"),
        backend=SimpleNamespace(process_group="gloo"),
    )
    actor: Any = SimpleNamespace(grid=grid, bucket_stream=lambda _: stream)

    class Transport(BroadcastTransport):
        def _send(self, attempt: Attempt, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
            SENT.append(tensors[0])
            return send(bucket) if send else super()._send(attempt, bucket, tensors)

    SENT.clear()
    Transport.renewed = renewed
    nobody_else: Any = None
    return Transport(actor, servers, 100, all_ranks=nobody_else, timeout_s=TIMEOUT_S)


def attempt() -> Attempt:
    return Attempt(dist.HashStore(), number=1, rank=0, members=MEMBERS, timeout_s=5)


def calls_of(entry: Any) -> list[str]:
    return [call for url, call in FakeControl.calls if url == entry.url]


def test_servers_are_paused_before_they_join_the_group(servers: SyncServers) -> None:
    """A server that joins finishes no batch: unless it is paused, the driver's pool takes it for hung."""
    transport = transport_of(servers, Stream(), lambda bucket: lambda: True)
    transport.deliver(attempt(), 3, NoChecksums())
    loads = ["receive_bucket"] * len(PLAN)
    for entry in MEMBERS:
        assert calls_of(entry) == ["pause", "init_update_group", "pause", "begin_update", *loads, "end_update"]
    FakeControl.calls.clear()
    transport.deliver(attempt(), 4, NoChecksums())
    for entry in MEMBERS:
        assert calls_of(entry) == ["pause", "begin_update", *loads, "end_update"], "the group is kept"


def test_servers_are_asked_for_a_bucket_while_they_still_load_the_one_before(servers: SyncServers) -> None:
    asked_for_second = threading.Event()

    def does(url: str, call: str) -> None:
        if call != "receive_bucket" or url != MEMBERS[0].url:
            return
        if calls_of(MEMBERS[0]).count("receive_bucket") == 1:
            assert asked_for_second.wait(10), "bucket 1 was not asked for while bucket 0 was being loaded"
        else:
            asked_for_second.set()

    FakeControl.does = staticmethod(does)
    transport_of(servers, Stream(), lambda bucket: lambda: True).deliver(attempt(), 3, NoChecksums())
    assert asked_for_second.is_set()


def test_no_bucket_is_asked_for_before_the_one_before_has_left(servers: SyncServers) -> None:
    left: list[int] = []

    def does(url: str, call: str) -> None:
        if call == "receive_bucket" and url == MEMBERS[0].url:
            number = calls_of(MEMBERS[0]).count("receive_bucket") - 1
            assert left[:number] == list(range(number))
            for _ in range(10_000):  # the server has the bucket once it has left the trainer
                if number in left:
                    return
                threading.Event().wait(0.001)
            raise AssertionError(f"bucket {number} did not arrive")

    def send(bucket: Bucket) -> Callable[[], bool]:
        asked = threading.Event()

        def is_sent() -> bool:
            if not asked.wait(0.01):
                asked.set()
                return False
            left.append(bucket.number)
            return True

        return is_sent

    FakeControl.does = staticmethod(does)
    transport_of(servers, Stream(), send).deliver(attempt(), 3, NoChecksums())
    assert left == [0, 1, 2, 3]


def test_a_rank_that_cannot_send_goes_on_gathering_and_ends_everybodys_wait(servers: SyncServers) -> None:
    def send(bucket: Bucket) -> Callable[[], bool]:
        if bucket.number == 1:
            raise RunError("trainer rank 0 could not send bucket 1")
        return lambda: True

    stream, this, closed = Stream(), attempt(), Group.closed
    with pytest.raises(RunError, match="could not send bucket 1"):
        transport_of(servers, stream, send).deliver(this, 3, NoChecksums())
    assert stream.gathered == [0, 1, 2, 3], "the other ranks of the stage wait for it there"
    assert this.is_posted("abandoned")
    assert Group.closed > closed, "servers that wait in the group wake up"


@pytest.mark.parametrize("call", ["pause", "init_update_group", "begin_update"])
def test_a_rank_whose_servers_are_gone_before_the_first_bucket_gathers_all_the_same(
    servers: SyncServers, call: str
) -> None:
    """The other ranks of its tensor-parallel group know nothing of it yet."""

    def does(url: str, called: str) -> None:
        if called == call:
            raise EngineGone(f"engine {url} is gone during {call}")

    FakeControl.does = staticmethod(does)
    stream, this = Stream(), attempt()
    with pytest.raises(EnginesLost):
        transport_of(servers, stream, lambda bucket: lambda: True).deliver(this, 3, NoChecksums())
    assert stream.gathered == [0, 1, 2, 3]
    assert SENT == []
    assert this.is_posted("abandoned")


def two_stages(
    servers: SyncServers, monkeypatch: pytest.MonkeyPatch, send: Callable[[Bucket], Callable[[], bool]]
) -> tuple[Any, Stream, list[tuple[int, int]]]:
    """A rank of stage 0 that sends all stages, as ipc on GPUs does; and what it broadcasts: (stage, address)."""
    plan = [Bucket(i, i % 2, (), bucket.tensors) for i, bucket in enumerate(PLAN + PLAN)]
    stream, broadcasts = Stream(), []
    stream.plan = plan

    def broadcast(tensor: Tensor, *, group: Any, group_src: int) -> None:
        broadcasts.append((group_src, tensor.data_ptr()))

    monkeypatch.setattr(dist, "broadcast", broadcast)
    transport = transport_of(servers, stream, send, renewed=True)
    transport._grid.pp_group = None
    monkeypatch.setattr(transport, "_load", lambda *_: None)
    transport.every_stage, transport.one_at_a_time = True, False
    return transport, stream, broadcasts


@pytest.mark.parametrize("failing", ["sending", "waiting"])
def test_a_rank_that_sends_all_stages_still_hands_on_every_bucket_after_a_failure(
    servers: SyncServers, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Ranks notice a failure at different buckets: one that left out a broadcast would meet another bucket's."""
    this = attempt()

    def send(bucket: Bucket) -> Callable[[], bool]:
        if bucket.number == 2 and failing == "sending":
            raise RunError("trainer rank 0 could not send bucket 2")
        if bucket.number == 2:
            this.abandon()  # noticed while bucket 4 waits for the buffer
        return lambda: bucket.number < 2

    transport, stream, broadcasts = two_stages(servers, monkeypatch, send)
    with pytest.raises(RunError if failing == "sending" else Abandoned):
        transport.deliver(this, 3, NoChecksums())
    assert [stage for stage, _ in broadcasts] == [0, 1] * 4
    assert stream.gathered == [0, 2, 4, 6]
    assert stream.packed == [address for stage, address in broadcasts if stage == 0]
    assert len(SENT) == (3 if failing == "sending" else 4), "nothing is sent after the failure"
    sent, after = {tensor.data_ptr() for tensor in SENT}, {address for _, address in broadcasts[len(SENT) + 1 :]}
    assert not sent & after, "a server may still read what was sent"


@pytest.mark.parametrize("succeeds", [True, False])
def test_no_buffer_on_a_gpu_outlives_an_attempt(
    servers: SyncServers, monkeypatch: pytest.MonkeyPatch, succeeds: bool
) -> None:
    """The engine on the same GPU needs the memory, also while the error is being handled."""
    this = attempt()

    def send(bucket: Bucket) -> Callable[[], bool]:
        if bucket.number == 2 and not succeeds:
            this.abandon()
        return lambda: succeeds or bucket.number < 2

    made: list[weakref.ref[Tensor]] = []

    def buffers(num_bytes: int, count: int) -> list[Tensor]:
        found = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(count)]
        made.extend(weakref.ref(flat) for flat in found)
        return found

    transport, _, _ = two_stages(servers, monkeypatch, send)
    transport._grid.device = torch.device("cuda", 0)
    monkeypatch.setattr(transport, "_buffers", buffers)
    with contextlib.nullcontext() if succeeds else pytest.raises(Abandoned) as raised:
        transport.deliver(this, 3, NoChecksums())
    SENT.clear()
    assert made
    assert [ref() for ref in made if ref() is not None] == []
    assert transport._kept == []
    assert (raised is None) == succeeds  # and it held the traceback until here


def test_a_buffer_that_a_server_may_still_read_is_not_written_again(servers: SyncServers) -> None:
    """CUDA IPC: a server answers before its GPU has copied the bucket. Memory that the sender lets go of is kept."""
    transport_of(servers, Stream(), lambda bucket: lambda: True, renewed=True).deliver(attempt(), 3, NoChecksums())
    assert len({tensor.data_ptr() for tensor in SENT}) == len(PLAN)  # SENT holds them all, as readers would
    transport_of(servers, Stream(), lambda bucket: lambda: True).deliver(attempt(), 3, NoChecksums())
    assert len({tensor.data_ptr() for tensor in SENT}) == 2


def test_a_server_that_dies_before_the_first_broadcast_does_not_block_the_main_thread(
    servers: SyncServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL connects in the first collective, which blocks until every member has come, even as an async one."""
    never = threading.Event()
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: never.wait(60))

    def does(url: str, call: str) -> None:
        if call == "receive_bucket" and url == MEMBERS[1].url:
            raise EngineGone(f"engine {url} is gone during receive_bucket")

    FakeControl.does = staticmethod(does)
    closed, start = Group.closed, time.monotonic()
    with pytest.raises(EnginesLost):
        transport_of(servers, Stream(), None).deliver(attempt(), 3, NoChecksums())
    assert time.monotonic() - start < TIMEOUT_S
    assert Group.closed > closed
    assert servers.members == MEMBERS[:1]
    never.set()
