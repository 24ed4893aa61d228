"""The driver's service, ended by its own hand at the delicate points of a delivery: each once in a run.

    python -m tests.rollout.weak_spots FOLDER RESOLVED.yaml ...

Batch 0 dies before the journal has it, batch 1 after that, batch 2 halfway through its lines of the record, all by
SIGKILL; batch 3 by an exception that nobody expected, before the answer is sent. A file in FOLDER for each tells the
next life that it happened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from collab_megatron.errors import run_cli
from collab_megatron.rollout import listener, service
from collab_megatron.rollout.delivered_batches import DeliveredBatches
from collab_megatron.rollout.record_files import RecordWriter
from collab_megatron.rollout.tree_scheduler import Tree
from collab_megatron.wire.protocol import Answer

SPOTS = 4


def main() -> None:
    folder = Path(sys.argv.pop(1))
    put, write, encode = DeliveredBatches.put, RecordWriter.write, listener.encode_answer
    newest = -1

    def die_at(step: int, *, by_exception: bool = False) -> None:
        mark = folder / f"died-{step}"
        if not mark.exists():
            mark.touch()
            if by_exception:
                raise KeyError(step)
            os.kill(os.getpid(), signal.SIGKILL)

    def weak_put(
        self: DeliveredBatches, step: int, trees: Sequence[Tree], answer: Answer, lines: Sequence[bytes]
    ) -> None:
        if step == 0:
            die_at(0)
        put(self, step, trees, answer, lines)
        if step == 1:
            die_at(1)

    def weak_write(self: RecordWriter, step: int, lines: Sequence[bytes]) -> str:
        nonlocal newest
        newest = step - 1  # the record counts from 1
        if newest == 2 and not (folder / "died-2").exists():
            write(self, step, [*lines[:-2], lines[-2][:100]])
            die_at(2)
        return write(self, step, lines)

    def weak_encode(answer: Answer) -> bytes:
        if answer.samples and newest == 3:
            die_at(3, by_exception=True)
        return encode(answer)

    DeliveredBatches.put = weak_put  # type: ignore[method-assign]
    RecordWriter.write = weak_write  # type: ignore[method-assign]
    listener.encode_answer = weak_encode
    service.main_or_bug()


if __name__ == "__main__":
    run_cli(main)
