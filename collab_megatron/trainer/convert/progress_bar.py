"""Progress of a conversion on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LINE_EVERY_S = 5.0

Advance = Callable[[int], None]  # called with the number of bytes just done


@contextlib.contextmanager
def progress(title: str, total_bytes: int, *, show: bool = True) -> Iterator[Advance]:
    """Yields a function to call with the bytes just done. `show` False (ranks other than 0): prints nothing."""
    if not show:
        yield lambda count: None
    elif sys.stderr.isatty():
        with _bar(title, total_bytes) as advance:
            yield advance
    else:
        lines = _Lines(title, total_bytes)
        yield lines.advance
        lines.print_line()


@contextlib.contextmanager
def _bar(title: str, total_bytes: int) -> Iterator[Advance]:
    from rich.console import Console  # only here: not needed without a terminal
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda count: bar.advance(task, count)


class _Lines:
    def __init__(self, title: str, total_bytes: int) -> None:
        self._title, self._total, self._done = title, total_bytes, 0
        self._start = self._printed_at = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._printed_at > _LINE_EVERY_S:
            self.print_line()

    def print_line(self) -> None:
        self._printed_at = time.monotonic()
        speed = self._done / 1e6 / max(self._printed_at - self._start, 1e-3)
        text = f"{self._title}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {speed:,.0f} MB/s"
        print(text, file=sys.stderr, flush=True)
