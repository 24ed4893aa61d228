"""The protocol of a transport: the way of the weights from the trainer's shards into the servers."""

from __future__ import annotations

from typing import Protocol

from collab_megatron.trainer.sync.attempt import Attempt
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums


class Transport(Protocol):
    """One object per trainer rank; broadcast, ipc and disk implement it."""

    def deliver(self, attempt: Attempt, version: int, expected: ExpectedChecksums) -> None:
        """Bring all weights into all members of the attempt. Collective over all trainer ranks.

        When it has returned on every rank, the members hold the weights as `version` and are still paused. What this
        rank has sent is added to `expected`.
        Raises EnginesLost on rank 0 when servers failed; elsewhere Abandoned or RunError, whichever comes first.
        """
        ...

    def close(self) -> None:
        """At the end of a run: release servers that outlive it."""
        ...
