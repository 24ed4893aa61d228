"""A process that writes into a journal and says so after each commit, until it is ended.

    python -m tests.rollout.journal.writer FILE NAME COUNT [MAX_FILE_BYTES]

Prints `i` once reply and turn number i are recorded. With COUNT 0 it never ends. MAX_FILE_BYTES makes the kernel refuse
longer files, as a full disk would.
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from contextlib import closing
from pathlib import Path

from collab_megatron.errors import run_cli
from collab_megatron.rollout.journal.store import Journal
from tests.rollout.journal.samples import key, reply, turn

PAUSE_S = 0.0003
"""A driver has other things to do between two replies. Without a break one process can keep the file from the others
for as long as it likes: SQLite's locks know no queue."""


def main() -> None:
    path, name, count, *limit = sys.argv[1:]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit[0]), int(limit[0])))
    with closing(Journal(Path(path), replay="auto", lineage="one")) as journal:
        for i in range(int(count)) if int(count) else itertools.count():
            journal.record_reply(key((name, i)), name, reply(f"{name} {i}", cost_usd=0.5))
            journal.record_turn(key((name, i)), [turn(i, tokens=20)])
            print(i, flush=True)
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    run_cli(main)
