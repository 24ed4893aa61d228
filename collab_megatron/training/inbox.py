"""How finished groups reach the trainer ranks: rank 0 asks the driver, the others wait on a gloo group of their own.

Never an NCCL collective: while users are being simulated the ranks wait on a group whose deadline is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist

from collab_megatron.actor.grid import RankGrid
from collab_megatron.driver.protocol import DriverClient
from collab_megatron.errors import RunError
from collab_megatron.types import RolloutBatch

MARGIN_S = 120.0
T = TypeVar("T")


class Inbox:
    """Build and use it on every rank alike."""

    def __init__(self, grid: RankGrid, *, driver_address: str, step_timeout_s: float, eval_timeout_s: float) -> None:
        self._grid = grid
        self._step_timeout_s = step_timeout_s
        self._eval_timeout_s = eval_timeout_s
        longest = timedelta(seconds=max(step_timeout_s, eval_timeout_s) + MARGIN_S)
        self._group = dist.new_group(backend="gloo", timeout=longest)
        self._driver = DriverClient(driver_address) if grid.is_main else None

    def next_batch(self, step: int, version: int) -> RolloutBatch:
        """The batch of `step` on every rank. Raises RunError on every rank if the driver could not deliver."""
        driver = self._driver
        return self._shared(
            (lambda: driver.next_batch(step, version, timeout_s=self._step_timeout_s)) if driver else None, RolloutBatch
        )

    def evaluate(self, step: int, version: int) -> dict[str, float]:
        """Held-out figures on every rank."""
        driver = self._driver
        return self._shared(
            (lambda: driver.evaluate(step, version, timeout_s=self._eval_timeout_s)) if driver else None,
            dict[str, float],
        )

    def close(self) -> None:
        """Tell the driver to end."""
        if self._driver is not None:
            self._driver.stop()
            self._driver.close()

    def _shared(self, ask: Callable[[], T] | None, kind: type[T]) -> T:
        """Rank 0's answer, or its error, on every rank."""
        failure: RunError | None = None
        payload = b""
        if ask is not None:
            try:
                payload = b"\x00" + msgspec.msgpack.encode(ask())
            except RunError as error:
                failure = error
                payload = b"\x01" + str(error).encode()
        size = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._group)
        data = (
            torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            if payload
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(data, src=0, group=self._group)
        received = data.numpy().tobytes()
        if received[:1] == b"\x01":
            raise failure or RunError(received[1:].decode())
        return msgspec.msgpack.decode(received[1:], type=kind)
