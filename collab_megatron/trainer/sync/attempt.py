"""One attempt of a sync: the servers that take part, the deadline of every wait, and the news between trainer ranks.

Collectives cannot carry the news of a failure: the rank that failed is not where the others expect it. So rank 0 hosts
a key-value store, and every wait polls it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

import torch.distributed as dist

from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.rendezvous import listening_store
from collab_megatron.wire.roster import EngineEntry

POLL_S = 0.0005
POLL_STORE_S = 0.02


class Abandoned(Exception):
    """Another rank has abandoned this attempt."""


def shared_store(group: dist.ProcessGroup, rank: int, *, timeout_s: float) -> dist.TCPStore:
    """A key-value store of the ranks of `group`, hosted by its rank 0. Collective over `group`."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    timeout = timedelta(seconds=timeout_s)
    port: list[int] = [0]
    if rank == 0:
        store = listening_store(host, 0, timeout=timeout)
        port = [store.port]
    dist.broadcast_object_list(port, src=0, group=group)
    return store if rank == 0 else dist.TCPStore(host, port[0], is_master=False, timeout=timeout)


class Attempt:
    """Owns the progress, the deadline and the abandonment of one attempt. Each rank builds its own."""

    def __init__(
        self, store: dist.Store, *, number: int, rank: int, members: tuple[EngineEntry, ...], timeout_s: float
    ) -> None:
        """`number`: no two attempts that use `store` have the same one. `timeout_s`: deadline of every wait."""
        self.members = members  # the servers that take part; the same on every rank
        self._store, self._number, self._rank, self._timeout_s = store, number, rank, timeout_s
        self._posted: list[str] = []  # keys that this rank has written
        self._sent: dict[int, Future[bool]] = {}

    def post(self, key: str, value: bytes = b"1") -> None:
        """Publish a value to all ranks."""
        name = self._name(key)
        self._posted.append(name)
        self._store.set(name, value)  # type: ignore[arg-type]  # torch takes bytes, its stub names str

    def is_posted(self, key: str) -> bool:
        return bool(self._store.check([self._name(key)]))

    def read(self, key: str) -> bytes:
        """The value of a key that was posted."""
        return bytes(self._store.get(self._name(key)))

    def abandon(self) -> None:
        """Make every rank's wait raise Abandoned."""
        self.post("abandoned")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Poll `done` until it is true. Raises Abandoned once a rank has abandoned the attempt, RunError at the
        deadline."""
        start = polled = time.monotonic()
        while not done():
            now = time.monotonic()
            if now - polled > POLL_STORE_S:
                polled = now
                if self.is_posted("abandoned"):
                    raise Abandoned
            if now - start > self._timeout_s:
                raise RunError(f"trainer rank {self._rank}: {what} did not end within {self._timeout_s:g} s")
            time.sleep(POLL_S)

    def sent(self, bucket_number: int) -> Future[bool]:
        """Done once this rank has sent the bucket: one thread sets it, another waits for it."""
        return self._sent.setdefault(bucket_number, Future())

    def close(self) -> None:
        """Delete this rank's keys. Call it after the collective that ends the attempt: no rank reads them any more."""
        for name in self._posted:
            self._store.delete_key(name)
        self._posted = []

    def _name(self, key: str) -> str:
        return f"{self._number}/{key}"
