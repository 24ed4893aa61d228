"""The journal of a run: every policy turn and every paid reply is stored before it is used, and looked up later.

    with closing(Journal(path, replay="auto", lineage=lineage)) as journal:
        if (reply := journal.reply(key)) is None:
            journal.record_reply(key, "user", reply := await ask())

A record_* call returns once a kill -9 can no longer lose the row (for a power cut see database.py). Rows have the step
of POSITION. Several processes may open the same file; a Journal belongs to one thread. Request keys are hashes, and
nothing is read from the environment, so the file contains no secrets.

replay: auto looks up; only looks up and raises ReplayMiss if nothing is found; off finds nothing. All three record.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from collab_megatron.config.sections import JournalSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.rollout.journal.database import STEP_TABLES, connect, create, damaged, explain
from collab_megatron.rollout.journal.housekeeping import Housekeeper
from collab_megatron.rollout.journal.packing import pack_generations, pack_texts, unpack_generations, unpack_texts
from collab_megatron.rollout.journal.reservations import held_by_others, set_aside
from collab_megatron.run_order import POSITION
from collab_megatron.types import Generation, LLMReply

Replay = Literal["auto", "only", "off"]
T = TypeVar("T")

FIND_REPLY = """
SELECT texts, prompt_tokens, completion_tokens, cost_usd, latency_s, model, fingerprint, deployment
FROM replies WHERE key = ?
"""
ADD_REPLY = """
INSERT OR REPLACE INTO replies (
    key, step, role, texts, prompt_tokens, completion_tokens, cost_usd, latency_s, model, fingerprint, deployment
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
KEEP_REPLY = (
    ADD_REPLY.replace("INSERT OR REPLACE", "INSERT") + "ON CONFLICT DO UPDATE SET step = max(step, excluded.step)"
)
ADD_SPEND = """
INSERT INTO spend VALUES (?, ?, 1, ?)
ON CONFLICT DO UPDATE SET calls = calls + 1, cost_usd = cost_usd + excluded.cost_usd
"""
FIND_TURN = """
SELECT content FROM turns WHERE key = ? AND lineage = ? AND newest <= ? AND oldest >= ? ORDER BY newest DESC LIMIT 1
"""
ADD_TURN = "INSERT OR REPLACE INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
FIND_DELIVERY = "SELECT content FROM deliveries WHERE lineage = ? AND shard = ? AND step = ?"
REMOVE_DELIVERY = "DELETE FROM deliveries WHERE lineage = ? AND shard = ? AND step = ?"
ADD_DELIVERY = "INSERT OR REPLACE INTO deliveries VALUES (?, ?, ?, ?)"
COUNT_ROWS = "SELECT " + " + ".join(f"(SELECT count(*) FROM {table})" for table in STEP_TABLES)


def open_journal(section: JournalSection, default: Path, lineage: str) -> Journal:
    """The journal of a config, at `default` unless journal.path is set. All processes of a run share the file.

    Raises UserError for a file that is not a journal.
    """
    return Journal(section.path or default, replay=section.replay, lineage=lineage)


def check_journal(path: Path, replay: Replay) -> None:
    """Raise UserError unless `path` is a journal, or does not exist and may be created; RunError for a damaged one."""
    if path.exists():
        connect(path, read_only=True).close()
    elif replay == "only":
        raise UserError(
            f"journal.replay is only, but there is no journal {path}: set journal.path to the run's journal"
        )


class ReplayMiss(RunError):
    """With replay: only, the journal does not have what the run needs."""


@dataclass(frozen=True)
class Spent:
    """Paid LLM requests: of a role and model over the whole run, or of a reservation."""

    calls: int  # answered requests
    cost_usd: float


class Journal:
    """One process's view of the journal's file. Raises UserError for a file that cannot be used.

    All methods raise RunError if the disk fails or another process keeps the file locked for BUSY_S.
    """

    def __init__(self, path: Path, *, replay: Replay, lineage: str) -> None:
        """Creates the file if there is none. `lineage` names everything that decides the weights: policy turns and
        deliveries are found only under the lineage that recorded them, replies under any."""
        if replay == "only":
            check_journal(path, replay)
        create(path)
        self._connection = connect(path)
        self._execute = self._connection.execute
        self._path = path
        self._replay = replay
        self._lineage = hashlib.blake2b(lineage.encode(), digest_size=8).digest()
        self._hits = self._misses = 0
        self._bytes = self._size()
        self._keeper = Housekeeper(path)
        self._keeper.start()

    @property
    def replay(self) -> Replay:
        return self._replay

    def reply(self, key: bytes, *, what: str = "a reply") -> LLMReply | None:
        """The newest reply recorded for `key`, or None. With replay: only, raises ReplayMiss naming `what` instead."""
        if self._replay == "off":
            return None
        rows = self._read(FIND_REPLY, key)
        if not self._found(rows, what):
            return None
        content, *rest = rows[0]
        return LLMReply(self._unpacked(unpack_texts, content), *rest)

    def record_reply(self, key: bytes, role: str, reply: LLMReply) -> None:
        """Store it and count it as paid, in one transaction."""
        self._commit((ADD_REPLY, _row(key, role, reply)), (ADD_SPEND, (role, _utf8(reply.model), reply.cost_usd)))

    def keep_reply(self, key: bytes, role: str, reply: LLMReply) -> None:
        """A reply that was paid for earlier is used in the current step: `prune` keeps it as long as that step."""
        self._commit((KEEP_REPLY, _row(key, role, reply)))

    def turn(
        self, key: bytes, *, oldest: int, newest: int, what: str = "a policy turn"
    ) -> tuple[Generation, ...] | None:
        """What weight versions in [oldest, newest] sampled for `key` under this lineage, the newest weights first.

        Raises ReplayMiss as `reply` does.
        """
        if self._replay == "off":
            return None
        rows = self._read(FIND_TURN, key, self._lineage, newest, oldest)
        return self._unpacked(unpack_generations, rows[0][0]) if self._found(rows, what) else None

    def record_turn(self, key: bytes, generations: Sequence[Generation]) -> None:
        """Store what one engine request sampled. Without any tokens it has no version and is not stored."""
        versions = {version for generation in generations for version in generation.versions_T}
        if not versions:
            return
        tokens = sum(len(generation.token_ids_T) for generation in generations)
        where = (key, self._lineage, max(versions), min(versions), POSITION.get().step)
        self._commit((ADD_TURN, (*where, len(generations), tokens, pack_generations(generations))))

    def spent(self) -> dict[tuple[str, str], Spent]:
        """(role, model) -> paid requests of all processes, restarts included. Pruning does not change it."""
        return {(role, model): Spent(calls, usd) for role, model, calls, usd in self._read("SELECT * FROM spend")}

    def reserve(self, held: Spent, decide: Callable[[Spent, Spent], Spent | None]) -> Spent | None:
        """Add what `decide` returns for new work to `held`, this process's reservation; None: no new work.

        `decide` gets what all processes have spent and what the others reserve. No process can spend or reserve until
        the result is in the file.
        """
        with self._transaction():
            rows = self._execute("SELECT calls, cost_usd FROM spend").fetchall()
            spent = Spent(sum(calls for calls, _ in rows), sum(usd for _, usd in rows))
            wanted = decide(spent, Spent(*held_by_others(self._connection)))
            new = wanted or Spent(0, 0.0)
            set_aside(self._connection, held.calls + new.calls, held.cost_usd + new.cost_usd)
        return wanted

    def delivered(self, shard: int, step: int) -> bytes | None:
        """The content from `record_delivery` under this lineage; None if there is none, or with replay: off."""
        rows = self._read(FIND_DELIVERY, self._lineage, shard, step) if self._replay != "off" else []
        return rows[0][0] if rows else None

    def record_delivery(self, shard: int, step: int, content: bytes) -> None:
        """Store the content that a shard delivers for a step, before it does."""
        self._commit((ADD_DELIVERY, (self._lineage, shard, step, content)))

    def remove_delivery(self, shard: int, step: int) -> None:
        """Remove the delivery of a shard for a step, if there is one."""
        self._commit((REMOVE_DELIVERY, (self._lineage, shard, step)))

    def prune(self, *, before_step: int) -> None:
        """Remove the rows of older steps, of every lineage, and free their space.

        Returns at once: a thread does the work, in transactions of about a millisecond.
        """
        self._keeper.prune(before_step)

    def metrics(self) -> dict[str, float]:
        """Values by dashboard name: MB of the file and its log, and their growth since the last call (negative after
        pruning); rows; lookups since the last call with a result (hits) and without (misses)."""
        before, self._bytes = self._bytes, self._size()
        figures = {
            "journal/mb": self._bytes / 1e6,
            "journal/grown_mb": (self._bytes - before) / 1e6,
            "journal/rows": float(self._read(COUNT_ROWS)[0][0]),
            "journal/hits": float(self._hits),
            "journal/misses": float(self._misses),
        }
        self._hits = self._misses = 0
        return figures

    def close(self) -> None:
        """Not needed to keep rows; the last process that closes leaves one file instead of three."""
        self._keeper.stop()
        self._connection.close()

    def _found(self, rows: list[Any], what: str) -> bool:
        """Whether a lookup has a result; counts it as a hit or a miss. Raises ReplayMiss."""
        if rows:
            self._hits += 1
            return True
        self._misses += 1
        if self._replay == "only":
            raise ReplayMiss(
                f"the journal {self._path} does not have {what} of step {POSITION.get().step + 1}, and journal.replay "
                "is only: set it to auto to ask for what is missing"
            )
        return False

    def _unpacked(self, unpack: Callable[[bytes], T], content: bytes) -> T:
        try:
            return unpack(content)
        except ValueError:  # msgspec's errors are ValueErrors
            raise RunError(damaged(self._path)) from None

    def _read(self, query: str, *values: object) -> list[Any]:
        try:
            return self._execute(query, values).fetchall()  # all of them: an open cursor would keep the log
        except sqlite3.Error as error:
            raise explain(error, self._path) from None

    def _commit(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        """All or nothing; safe from a kill -9 when it returns."""
        with self._transaction():
            for statement, values in statements:
                self._execute(statement, values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """A block in which this process is the only writer of the file."""
        if self._keeper.error is not None:
            raise self._keeper.error
        try:
            self._execute("BEGIN IMMEDIATE")
            yield
            self._execute("COMMIT")
        except sqlite3.Error as error:
            raise explain(error, self._path) from None
        finally:
            if self._connection.in_transaction:  # it failed halfway
                self._connection.rollback()
        self._keeper.written = True

    def _size(self) -> int:
        """Bytes of the file and of its log."""
        files = (self._path, self._path.with_name(self._path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())


def _row(key: bytes, role: str, reply: LLMReply) -> tuple[Any, ...]:
    """The row of a reply in the current step."""
    return (
        key, POSITION.get().step, role, pack_texts(reply.texts), reply.prompt_tokens, reply.completion_tokens,
        reply.cost_usd, reply.latency_s, _utf8(reply.model), _utf8(reply.fingerprint), reply.deployment,
    )  # fmt: skip


def _utf8(text: str) -> str:
    """A provider's text, with characters that SQLite cannot store as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
