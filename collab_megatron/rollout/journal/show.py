"""Prints the contents of a journal: replies with dollars and seconds, policy turns and deliveries of every step.

    python -m collab_megatron.rollout.journal.show RUN_DIR/journal/NAME.sqlite

The file is opened read-only, so a run that writes to it goes on.
"""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from collab_megatron.errors import UserError, run_cli
from collab_megatron.rollout.journal.database import connect, explain

REPLIES = """
SELECT step, role, model, count(*), sum(cost_usd), avg(latency_s), sum(prompt_tokens), sum(completion_tokens)
FROM replies GROUP BY step, role, model ORDER BY step, role, model
"""
TURNS = "SELECT step, count(*), sum(generations), sum(tokens) FROM turns GROUP BY step"
DELIVERIES = "SELECT step, count(*), sum(length(content)) FROM deliveries GROUP BY step"
SPEND = "SELECT role, model, calls, cost_usd FROM spend ORDER BY role, model"


def lines(connection: sqlite3.Connection) -> Iterator[str]:
    """One line per step and kind of row, then the totals of the run. Steps count from 1, as on the dashboard; step 0 is
    work before the first."""
    by_step: dict[int, list[str]] = {}
    for step, role, model, count, usd, mean_s, prompt, completion in connection.execute(REPLIES):
        by_step.setdefault(step, []).append(
            f"{role} ({model or 'model not named'}): {count:,} replies, ${usd:.4f}, mean {mean_s:.2f} s, "
            f"{prompt:,} + {completion:,} tokens"
        )
    for step, count, generations, tokens in connection.execute(TURNS):
        by_step.setdefault(step, []).append(f"policy: {count:,} requests, {generations:,} turns, {tokens:,} tokens")
    for step, count, size in connection.execute(DELIVERIES):
        by_step.setdefault(step, []).append(f"delivered by {count:,} shards, {size / 1e6:.2f} MB")
    for step in sorted(by_step):
        yield from (f"step {step + 1:5d}  {line}" for line in by_step[step])
    for role, model, calls, usd in connection.execute(SPEND):
        yield f"whole run   {role} ({model or 'model not named'}): {calls:,} replies, ${usd:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the contents of a journal, step by step.")
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    if not args.file.exists():
        raise UserError(f"there is no journal {args.file}: look in RUN_DIR/journal, or at the run's journal.path")
    if args.file.is_dir():
        raise UserError(f"{args.file} is a folder: give a journal's file, such as RUN_DIR/journal/NAME.sqlite")
    with closing(connect(args.file, read_only=True)) as connection:
        try:
            for line in lines(connection):
                print(line)
        except sqlite3.Error as error:
            raise explain(error, args.file) from None


if __name__ == "__main__":
    run_cli(main)
