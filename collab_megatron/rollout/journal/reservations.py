"""What the processes of a run have set aside of its budget for work under way: one row a process, in the journal.

A row counts as long as its process lives: pid and start time name a process, so that what a killed one set aside is
free again, also where another process has its pid by then. All processes that write to a journal run on one machine
(database.py).
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
"""Place of the start time in /proc/PID/stat, counted behind the command's name, which may hold spaces."""


@cache
def started(pid: int) -> int:
    """When a process was started, in clock ticks since the machine was. Raises OSError where there is none."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[START_FIELD])


def set_aside(connection: sqlite3.Connection, calls: int, cost_usd: float) -> None:
    """In the open transaction: what this process holds now."""
    pid = os.getpid()
    connection.execute(SET, (pid, started(pid), calls, cost_usd))


def held_by_others(connection: sqlite3.Connection) -> tuple[int, float]:
    """In the open transaction: calls and dollars that other live processes hold. Rows of ended ones are removed."""
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
        return started.__wrapped__(pid) == since  # another process may have the pid by now: never from the cache
    except (OSError, ValueError):
        return False
