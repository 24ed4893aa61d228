"""A trainer rank whose engine is killed while a bucket of sync N is sent to it: killed_engine_ranks.py JOB.json N.

Writes OUT/said.json: the class of the error, its text, and the seconds from the kill to it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from collab_megatron.config.sections import EngineSection, ParallelSection, SyncSection
from collab_megatron.errors import RunError, run_rank
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import init_grid
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.attempt import Attempt
from collab_megatron.trainer.sync.bucket_transport import BucketTransport
from collab_megatron.trainer.sync.publisher import Publisher

WAIT_S = 2  # for a server that might come back, a third of it


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    killed_at = int(sys.argv[2])
    out = Path(job["out"])
    grid = init_grid(ParallelSection(device=job["device"]), seed=1)
    actor = Actor.build(job["model"], dtype=job["dtype"], grid=grid, optimizer=None)
    publisher = Publisher(
        actor,
        roster=Path(job["roster"]),
        engine=EngineSection(startup_timeout_s=WAIT_S, **job["engine"]),
        sync=SyncSection(**job["sync"]),
        probe_ids=list(range(5, 45)),
        weights_dir=out / "weights",
    )
    for version in range(killed_at):
        publisher.publish(version)
    transport: Any = publisher._transport
    assert isinstance(transport, BucketTransport)
    send = transport._send
    killed: list[float] = []

    def kill_then_send(attempt: Attempt, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        if bucket.number == 1 and not killed:
            os.killpg(job["server_pid"], signal.SIGKILL)  # with its ranks, as when a node is lost
            killed.append(time.monotonic())
        return send(attempt, bucket, tensors)

    setattr(transport, "_send", kill_then_send)  # noqa: B010
    error: RunError | None = None
    try:
        publisher.publish(killed_at)
    except RunError as raised:
        error = raised
    seconds = time.monotonic() - killed[0] if killed else -1.0
    said = {"error": type(error).__name__, "text": str(error), "seconds": seconds}
    (out / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    run_rank(main)  # as train_rl ends: without the finalization that a broken communicator might hold up
