"""Budget reservations of the processes of a run: one row per process, in the journal.

A row counts while its process lives. A process is identified by pid and start time, so the reservation of a killed one
ends even if another process gets its pid. All processes that write to a journal run on one machine (database.py).
"""

from __future__ import annotations

import os
import sqlite3
from functools import cache
from pathlib import Path

CREATE = """
CREATE TABLE IF NOT EXISTS reserved (
    pid INTEGER NOT NULL, started INTEGER NOT NULL, calls INTEGER NOT NULL, cost_usd REAL NOT NULL,
    PRIMARY KEY (pid, started)
) WITHOUT ROWID
"""
SET = "INSERT OR REPLACE INTO reserved VALUES (?, ?, ?, ?)"
START_FIELD = 19
"""Index of the start time in /proc/PID/stat, counted after the command's name, which may contain spaces."""


@cache
def started(pid: int) -> int:
    """Start time of a process, in clock ticks since the machine started. Raises OSError if there is none."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[START_FIELD])


def set_aside(connection: sqlite3.Connection, calls: int, cost_usd: float) -> None:
    """Set the reservation of this process, within the open transaction."""
    pid = os.getpid()
    connection.execute(SET, (pid, started(pid), calls, cost_usd))


def held_by_others(connection: sqlite3.Connection) -> tuple[int, float]:
    """Calls and dollars that other live processes reserve. Within the open transaction; removes rows of dead ones."""
    calls, cost_usd, me = 0, 0.0, os.getpid()
    connection.execute(CREATE)
    for pid, since, held_calls, held_usd in connection.execute("SELECT * FROM reserved").fetchall():
        if pid == me and since == started(me):
            continue
        if _lives(pid, since):
            calls, cost_usd = calls + held_calls, cost_usd + held_usd
        else:
            connection.execute("DELETE FROM reserved WHERE pid = ? AND started = ?", (pid, since))
    return calls, cost_usd


def _lives(pid: int, since: int) -> bool:
    try:
        return started.__wrapped__(pid) == since  # not from the cache: another process may have the pid
    except (OSError, ValueError):
        return False
