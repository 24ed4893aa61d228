"""Housekeeping of the journal's file during a run: checkpoints of the write-ahead log, and removal of old steps' rows.

It runs in a thread with its own connection, so that writes of the event loop meet only short locks. Every process with
an open journal has one; SQLite lets one of them work at a time.
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
"""Checkpoints in a row. The log starts over only if nobody wrote during the last one."""
MAX_LOG_PAGES = 8192
"""Pages (of 4 KiB) above which writers must wait for the rest of a checkpoint; otherwise a log that is written to all
the time would grow without end."""
RESTART_WAIT_S = 0.05
"""Longest wait of theirs for a reader of the old log."""
BATCH_ROWS, BATCH_PAGES, BATCH_PAUSE_S = 50, 50, 0.004
"""Size of one transaction, which blocks writers for about a millisecond; the pause after it lets them in."""


class Housekeeper:
    """The thread. It starts with `start` and ends with `stop` or with the process."""

    def __init__(self, path: Path) -> None:
        self.written = False  # set by the owner at each commit
        self.error: UserError | RunError | None = None  # ended the thread; for the owner to raise
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
        """Waits for the current transaction. Rows that are left are removed by a later `prune`."""
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
        checkpoint(connection)  # the file is cut only now

    def _go_on(self, connection: sqlite3.Connection) -> bool:
        """Between two batches: let writers in, and keep the log short. False once stopped."""
        if time.monotonic() - self._checked_at > TICK_S:
            checkpoint(connection)
            self._checked_at = time.monotonic()
        return not self._stopped.wait(BATCH_PAUSE_S)


def checkpoint(connection: sqlite3.Connection) -> None:
    """Move the log's pages into the file; blocks writers only if the log has become too long."""
    before = pages = 0
    for _ in range(CATCH_UP):
        busy, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if busy or pages == before:
            return  # another process does it, or nobody wrote during the last one
        before = pages
    if pages > MAX_LOG_PAGES:
        connection.execute(f"PRAGMA busy_timeout = {RESTART_WAIT_S * 1000:.0f}")
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        connection.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")


def empty(path: Path) -> None:
    """Remove all rows except the costs, and free their space. For a journal that nobody else writes to.

    Raises UserError or RunError as `connect` does, and RunError if the disk fails.
    """
    with closing(connect(path)) as connection:
        try:
            for table in STEP_TABLES:
                connection.execute(f"DELETE FROM {table}")
            connection.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")
        except sqlite3.Error as error:
            raise explain(error, path) from None
