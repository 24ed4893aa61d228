"""The update session with all servers, seen from rank 0: pause -> begin -> (weights) -> end -> ... -> continue.

It keeps the time during which no token was produced.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from collab_megatron.engine.control import PauseMode
from collab_megatron.trainer.sync.servers import EnginesLost, Receivers


class Session:
    """Of one attempt."""

    def __init__(self, receivers: Receivers, mode: PauseMode) -> None:
        self.receivers = receivers
        self._mode = mode
        self._paused_at: float | None = None
        self.paused_s = 0.0
        self.flushed = True  # no server kept a prefix cache of older weights

    def pause(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Servers that are paused already stay so."""
        mode = self._mode
        self.receivers.each("pause_generation", lambda control, _: control.pause(mode), on_failure=on_failure)
        self._paused_at = self._paused_at or time.monotonic()

    def open(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Pause, and make the servers ready for tensors."""
        self.pause(on_failure)
        self.receivers.each("begin_weight_update", lambda control, _: control.begin_update(), on_failure=on_failure)

    def close(self) -> None:
        """All tensors are there."""
        self.on_survivors("end_weight_update", lambda control, _: control.end_update())

    def flush(self) -> None:
        """Empty the prefix caches where no request in flight forbids it. The driver does not depend on it: it keeps the
        versions apart by cache key."""
        self.flushed = all(self.on_survivors("flush_cache", lambda control, _: control.flush_cache(timeout_s=0)))

    def resume(self) -> None:
        self.on_survivors("continue_generation", lambda control, _: control.resume())
        if self._paused_at is not None:
            self.paused_s = time.monotonic() - self._paused_at

    def on_survivors(self, what: str, call: Callable[..., object]) -> list[object]:
        """As Receivers.each, for calls that a server's death leaves of use to the others. Raises EnginesLost when none
        is left."""
        while True:
            try:
                return list(self.receivers.each(what, call).values())
            except EnginesLost:
                if not self.receivers.members:
                    raise
