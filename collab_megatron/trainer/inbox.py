"""How finished groups reach the trainer ranks: rank 0 asks the driver, the others wait on a gloo group of their own.

Never an NCCL collective: while users are being simulated the ranks wait on a group whose deadline is the driver's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist

from collab_megatron.errors import (
    BudgetSpent,
    EvaluationFailed,
    Interrupted,
    NoEngineLeft,
    RunError,
    SimulatorSick,
    TooManyErrors,
)
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.interrupt import Interrupt
from collab_megatron.types import RolloutBatch
from collab_megatron.wire.protocol import DriverClient, DriverHasNoEngine, DriverResult

MARGIN_S = 120.0
EVALUATION_GRACE_S = 30.0
"""The driver itself ends an evaluation at its deadline, and hands over what is there."""
DELIVERED = b"\x00"
FAILED = b"\xff"
KINDS: dict[bytes, type[RunError]] = {
    b"\x01": NoEngineLeft,
    b"\x02": BudgetSpent,
    b"\x03": SimulatorSick,
    b"\x04": Interrupted,
    b"\x05": EvaluationFailed,
    b"\x06": TooManyErrors,
    FAILED: RunError,
}
"""What rank 0 met, for the others to raise; the first that fits."""
T = TypeVar("T")


class Inbox:
    """Build and use it on every rank alike."""

    def __init__(
        self,
        grid: RankGrid,
        *,
        driver_addresses: Sequence[str],
        driver_token: bytes,
        step_timeout_s: float,
        eval_timeout_s: float,
        interrupt: Interrupt | None = None,
    ) -> None:
        """driver_addresses: one for each shard; driver_token: what all of them want to see. interrupt: ends a wait for
        the driver, with Interrupted."""
        self._interrupt = interrupt
        self._grid = grid
        self._step_timeout_s = step_timeout_s
        self._eval_timeout_s = eval_timeout_s
        longest = timedelta(seconds=max(step_timeout_s, eval_timeout_s) + MARGIN_S)
        self._group = dist.new_group(backend="gloo", timeout=longest)
        self._driver = DriverClient(driver_addresses, driver_token) if grid.is_main else None
        self._lost: dict[str, str] = {}

    def next_batch(self, step: int, version: int, engines: Sequence[str], saved: int) -> RolloutBatch:
        """The batch of `step` on every rank, sampled by the servers at `engines`, which hold `version`; the newest
        complete checkpoint holds `saved` steps.

        Rank 0's arguments count. Raises NoEngineLeft on every rank if the driver had to give all engines up: the same
        step can be asked for again. Raises BudgetSpent, SimulatorSick or TooManyErrors where the run must stop,
        RunError if the driver could not deliver.
        """
        driver = self._driver
        return self._shared(
            (lambda: driver.next_batch(step, version, engines, saved=saved, timeout_s=self._step_timeout_s))
            if driver
            else None,
            RolloutBatch,
        )

    def evaluate(self, step: int, version: int, engines: Sequence[str]) -> dict[str, float]:
        """Held-out figures on every rank; `engines`, and what it raises, as in `next_batch`."""
        driver = self._driver
        return self._shared(
            (lambda: driver.evaluate(step, version, engines, timeout_s=self._eval_timeout_s + EVALUATION_GRACE_S))
            if driver
            else None,
            dict[str, float],
        )

    def take_lost(self) -> dict[str, str]:
        """The servers that the driver gave up since the last call: URL -> reason. Known on rank 0 alone."""
        lost, self._lost = self._lost, {}
        return lost

    def close(self) -> None:
        """Tell the driver to end."""
        if self._driver is not None:
            self._driver.stop()
            self._driver.close()

    def _shared(self, ask: Callable[[], DriverResult[T]] | None, content: type[T]) -> T:
        """The content of rank 0's delivery, or its error, on every rank."""
        failure: Exception | None = None
        payload = b""
        if ask is not None:
            try:
                with self._interrupt.waiting() if self._interrupt else contextlib.nullcontext():
                    delivery = ask()
                self._lost |= delivery.lost
                for note in delivery.notes:
                    print(note, flush=True)
                payload = DELIVERED + msgspec.msgpack.encode(delivery.content)
            except Exception as error:  # noqa: BLE001  (raised below, once the others have heard of it)
                failure = error
                kind = next((code for code, known in KINDS.items() if isinstance(error, known)), FAILED)
                payload = kind + str(error).encode("utf-8", "replace")
                if isinstance(error, DriverHasNoEngine):
                    self._lost |= error.lost
        size = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._group)
        data = (
            torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            if payload
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(data, src=0, group=self._group)
        received = data.numpy().tobytes()
        if received[:1] != DELIVERED:
            raise failure or KINDS[received[:1]](received[1:].decode())
        return msgspec.msgpack.decode(received[1:], type=content)
