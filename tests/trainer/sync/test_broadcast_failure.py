"""A broadcast that fails: its error keeps nothing alive that holds the group's connections open."""

from __future__ import annotations

import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collab_megatron.errors import RunError
from collab_megatron.trainer.sync.broadcast_transport import BroadcastTransport


class FailedWork:
    """As a torch Work whose peer was killed; a real one holds gloo's connections."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        raise RuntimeError("Connection closed by peer\nGLHF")


@pytest.mark.parametrize("at_once", [True, False], ids=["at the call", "while waiting"])
def test_the_error_lets_go_of_the_works(at_once: bool) -> None:
    alive: list[weakref.ref[FailedWork]] = []

    def broadcast(group: Any, tensors: Any) -> list[FailedWork]:
        work = FailedWork()
        alive.append(weakref.ref(work))
        if at_once:
            work.wait()
        return [work]

    group = SimpleNamespace(group=object())
    transport: Any = SimpleNamespace(_group=group, _grid=SimpleNamespace(rank=0), _broadcast=broadcast)
    bucket: Any = SimpleNamespace(number=3)
    attempt: Any = None
    is_sent = BroadcastTransport._send(transport, attempt, bucket, [torch.zeros(1)])
    with pytest.raises(RunError, match=r"rank 0 could not send bucket 3: Connection closed by peer$") as raised:
        while not is_sent():
            time.sleep(0.001)
    failure = raised.value.with_traceback(None)  # as BucketTransport._tried keeps it
    del is_sent, raised
    deadline = time.monotonic() + 5
    while alive[0]() is not None and time.monotonic() < deadline:  # the thread of the call ends by itself
        time.sleep(0.01)
    assert alive[0]() is None, f"held by {failure!r}"
