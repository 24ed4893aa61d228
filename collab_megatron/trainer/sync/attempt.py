"""What trainer ranks tell each other in the middle of a sync, while each of them is in a wait of its own.

Collectives cannot carry such news: whoever fails is not where the others expect it. So rank 0 holds a small key-value
store, which everybody polls between two steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.rendezvous import listening_store

POLL_S = 0.0005


class Abandoned(Exception):
    """Another rank gave this attempt up."""


class Board:
    """Keys live as long as the attempt that wrote them. Build it on every rank alike."""

    def __init__(self, group: dist.ProcessGroup, rank: int, *, timeout_s: float) -> None:
        """Collective over `group`, whose rank 0 keeps the store."""
        self._attempt = 0
        self._mine: list[str] = []  # what this rank has posted in this attempt
        self._timeout_s = timeout_s
        self._rank = rank
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=timeout_s)
        where: list[int] = [0]
        if rank == 0:
            self._store = listening_store(host, 0, timeout=timeout)
            where = [self._store.port]
        dist.broadcast_object_list(where, src=0, group=group)
        if rank != 0:
            self._store = dist.TCPStore(host, where[0], is_master=False, timeout=timeout)

    def next_attempt(self) -> None:
        """From now on keys are those of another attempt. Every rank calls it, between two collectives."""
        self._attempt += 1
        stale, self._mine = self._mine, []
        for name in stale:  # nobody reads them any more: a collective lies between
            self._store.delete_key(name)

    def post(self, key: str, value: bytes = b"1") -> None:
        self._mine.append(self._name(key))
        self._store.set(self._name(key), value)  # type: ignore[arg-type]  # torch takes bytes, its stub says str

    def posted(self, key: str) -> bool:
        return bool(self._store.check([self._name(key)]))

    def read(self, key: str) -> bytes:
        """The value of a key that was posted."""
        return bytes(self._store.get(self._name(key)))

    def abandon(self) -> None:
        """Tell everybody that this attempt has failed."""
        self.post("abandoned")

    def wait(self, done: Callable[[], bool], what: str, *, news_every_s: float = 0.02) -> None:
        """Until `done()`. Raises Abandoned once somebody gave the attempt up, RunError at the deadline."""
        start = time.monotonic()
        asked = start
        while not done():
            now = time.monotonic()
            if now - asked > news_every_s:
                asked = now
                if self.posted("abandoned"):
                    raise Abandoned
            if now - start > self._timeout_s:
                raise RunError(f"trainer rank {self._rank}: {what} did not end within {self._timeout_s:g} s")
            time.sleep(POLL_S)

    def _name(self, key: str) -> str:
        return f"{self._attempt}/{key}"
