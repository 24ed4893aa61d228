"""A call on a thread of its own, as a Future."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_background(name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Start `call` on a daemon thread. No executor: it would wait at exit for a call that hangs."""
    future: Future[T] = Future()

    def run(future: Future[T]) -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  (raised where the result is read)
            future.set_exception(error)
            del future  # the error's traceback holds this frame: a cycle that keeps alive what `call` held

    threading.Thread(target=run, args=(future,), name=name, daemon=True).start()
    return future
