"""Keeps the journal's file small beside the run: checkpoints of the write-ahead log, and rows of old steps removed.

A thread with a connection of its own, so that the event loop's writes meet short locks only. Every process that has the
journal open runs one; SQLite lets one of them at a time work.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from collab_megatron.errors import RunError, UserError
from collab_megatron.rollout.journal.database import BUSY_S, STEP_TABLES, connect, explain

TICK_S = 0.5
CATCH_UP = 5
"""Checkpoints in a row. The log begins anew from its start only if nobody wrote during the last one."""
MAX_LOG_PAGES = 8192
"""Pages (of 4 KiB) from which on writers are made to wait for the rest of a checkpoint: without it a log that is
written to all the time would grow without end."""
RESTART_WAIT_S = 0.05
"""How long they may wait for a reader of the old log to end."""
BATCH_ROWS, BATCH_PAGES, BATCH_PAUSE_S = 50, 50, 0.004
"""Of one transaction: it keeps writers waiting for about a millisecond. The pause lets them in."""


class Housekeeper:
    """The thread; begins with `start`, ends with `stop` or with the process."""

    def __init__(self, path: Path) -> None:
        self.written = False  # set by the owner at each commit
        self.error: UserError | RunError | None = None  # what ended the thread, for the owner to raise
        self._path = path
        self._before_step: int | None = None
        self._checked_at = time.monotonic()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def prune(self, before_step: int) -> None:
        """Remove the rows of older steps, soon."""
        self._before_step = before_step
        self._wake.set()

    def stop(self) -> None:
        """Waits for the transaction under way. What is left to remove is removed after a later `prune`."""
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with closing(connect(self._path)) as connection:
                while not self._stopped.is_set():
                    self._wake.wait(TICK_S)
                    self._wake.clear()
                    before_step, self._before_step = self._before_step, None
                    if before_step is not None:
                        self._prune(connection, before_step)
                    if self.written:
                        self.written = False
                        checkpoint(connection)
        except sqlite3.Error as error:
            self.error = explain(error, self._path)
        except (UserError, RunError) as error:
            self.error = error

    def _prune(self, connection: sqlite3.Connection, before_step: int) -> None:
        """Ends early when stopped."""
        for table in STEP_TABLES:
            some = f"SELECT rowid FROM {table} WHERE step < ? LIMIT {BATCH_ROWS}"
            delete = f"DELETE FROM {table} WHERE rowid IN ({some})"
            while connection.execute(delete, (before_step,)).rowcount and self._go_on(connection):
                continue
        while connection.execute("PRAGMA freelist_count").fetchone()[0] and self._go_on(connection):
            # not execute: that takes one step of the pragma, which frees one page
            connection.executescript(f"PRAGMA incremental_vacuum({BATCH_PAGES})")
        checkpoint(connection)  # only now the file is cut

    def _go_on(self, connection: sqlite3.Connection) -> bool:
        """Between two batches: writers are let in, and the log is kept short."""
        if time.monotonic() - self._checked_at > TICK_S:
            checkpoint(connection)
            self._checked_at = time.monotonic()
        return not self._stopped.wait(BATCH_PAUSE_S)


def checkpoint(connection: sqlite3.Connection) -> None:
    """Bring the log's pages into the file without holding up anybody; where the log has grown too long, with."""
    before = pages = 0
    for _ in range(CATCH_UP):
        busy, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if busy or pages == before:
            return  # another process is at it, or nobody wrote during the last one
        before = pages
    if pages > MAX_LOG_PAGES:
        connection.execute(f"PRAGMA busy_timeout = {RESTART_WAIT_S * 1000:.0f}")
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        connection.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")


def empty(path: Path) -> None:
    """Remove all rows but what was spent, and give their space back. For a journal that nobody else writes to.

    Raises UserError or RunError as `connect` does, RunError where the disk refuses.
    """
    with closing(connect(path)) as connection:
        try:
            for table in STEP_TABLES:
                connection.execute(f"DELETE FROM {table}")
            connection.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")
        except sqlite3.Error as error:
            raise explain(error, path) from None
