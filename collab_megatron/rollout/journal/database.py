"""The journal's SQLite file: tables, creation, connections and error messages.

It uses the write-ahead log with synchronous=NORMAL: committed rows survive a kill -9 of every process. A power cut may
lose the newest rows (about a second's), but does not damage the file. Several processes read and write it. It must be
on a local disk: the log's index is shared memory, which a network file system does not have.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from collab_megatron.errors import RunError, UserError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x436F4A6C  # tells a journal from other SQLite files
BUSY_S = 10.0
"""Longest wait of a write for those of other processes."""

TABLES = f"""
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE replies (
    key BLOB PRIMARY KEY, step INTEGER NOT NULL, role TEXT NOT NULL, texts BLOB NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL, latency_s REAL NOT NULL,
    model TEXT NOT NULL, fingerprint TEXT NOT NULL, deployment INTEGER NOT NULL
);
CREATE INDEX replies_by_step ON replies (step);
CREATE TABLE turns (
    key BLOB NOT NULL, lineage BLOB NOT NULL, newest INTEGER NOT NULL, oldest INTEGER NOT NULL,
    step INTEGER NOT NULL, generations INTEGER NOT NULL, tokens INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (key, lineage, newest, oldest)
);
CREATE INDEX turns_by_step ON turns (step);
CREATE TABLE deliveries (
    lineage BLOB NOT NULL, shard INTEGER NOT NULL, step INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (lineage, shard, step)
);
CREATE TABLE spend (
    role TEXT NOT NULL, model TEXT NOT NULL, calls INTEGER NOT NULL, cost_usd REAL NOT NULL,
    PRIMARY KEY (role, model)
) WITHOUT ROWID;
PRAGMA journal_mode = WAL;
"""
STEP_TABLES = ("replies", "turns", "deliveries")
"""Tables whose rows are removed with their step; `spend` stays."""

# wal_autocheckpoint: a checkpoint inside a commit would block the event loop (housekeeping.py makes them)
# secure_delete: some builds overwrite deleted rows, which costs a write for every page
# journal_size_limit (bytes): a longer log is cut when it starts over
SETTINGS = (
    "synchronous = NORMAL",
    "wal_autocheckpoint = 0",
    "journal_size_limit = 67108864",
    "secure_delete = OFF",
    "cache_size = -16384",
)


def create(path: Path) -> None:
    """Create an empty journal unless the file exists. Raises UserError if that is not possible.

    The file is written under another name and then linked: if several processes create it, one of them wins, and none
    sees an incomplete file.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(aside)) as connection:
            connection.executescript(TABLES)
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
    except OSError as error:
        raise UserError(f"cannot create the journal {path} ({error.strerror}): set journal.path") from None
    except sqlite3.Error as error:
        raise explain(error, path) from None


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode to an existing journal, for one thread.

    Raises UserError for a file that is not a journal, is of a newer version or cannot be opened; RunError for a damaged
    one.
    """
    mode = "ro" if read_only else "rw"
    connection = None
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=BUSY_S, isolation_level=None
        )
        _check(connection, path)
        for setting in SETTINGS:
            connection.execute(f"PRAGMA {setting}")
        return connection
    except (sqlite3.Error, UserError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error):
            raise explain(error, path) from None
        raise


def explain(error: sqlite3.Error, path: Path) -> UserError | RunError:
    """The failure of an SQLite call, in a sentence with what to do."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest is detail
    if code == sqlite3.SQLITE_NOTADB:
        return UserError(f"{path} is not an SQLite file: move it away, or set journal.path")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY):
        return UserError(
            f"cannot open the journal {path} for writing ({error}): fix its permissions, or set journal.path"
        )
    if code == sqlite3.SQLITE_CORRUPT:
        return RunError(damaged(path))
    if code == sqlite3.SQLITE_FULL:
        return RunError(f"the disk of the journal {path} is full: free some space and resume; the journal is kept")
    if code == sqlite3.SQLITE_BUSY:
        return RunError(
            f"the journal {path} was locked by another process for {BUSY_S:g} s: end that process and resume"
        )
    return RunError(f"the journal {path} cannot be read or written ({error}): check its disk and resume")


def damaged(path: Path) -> str:
    return f"the journal {path} is damaged: move it away; the run then asks again for what it contained"


def _check(connection: sqlite3.Connection, path: Path) -> None:
    ((application,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    if application != APPLICATION_ID:
        raise UserError(f"{path} is an SQLite file but not a journal: move it away, or set journal.path")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"the journal {path} is of a newer version ({version}; this one reads {SCHEMA_VERSION}): update "
            "collab_megatron, or set journal.path"
        )
