"""Transport `disk`: a folder of safetensors files that appears at once, for servers outside the job.

Written before the servers are paused; they pause only for reading it. Only the newest folder is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from collab_megatron.errors import RunError, UserError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.convert.hf_folder import write_hf_folder
from collab_megatron.trainer.sync.attempt import Abandoned, Board
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums
from collab_megatron.trainer.sync.servers import Receivers
from collab_megatron.trainer.sync.session import Session
from collab_megatron.wire.roster import EngineEntry

PREFIX = "weights-v"


class DiskDelivery:
    """`folder` must be the same for trainer and servers: on a cluster, on a shared file system."""

    def __init__(self, actor: Actor, board: Board, folder: Path, *, shard_bytes: int) -> None:
        self._actor, self._board = actor, board
        self._folder = folder.absolute()
        self._shard_bytes = shard_bytes

    def deliver(
        self, members: Sequence[EngineEntry], version: int, session: Session | None, expected: ExpectedChecksums
    ) -> None:
        stream = self._actor.hf_tensors()
        if session is None:
            for _ in stream:  # take part in the gathering
                continue
            return
        target = self._folder / f"{PREFIX}{version:08d}"
        try:
            self._write(stream, target, expected)
        finally:
            for _ in stream:  # the other ranks gather to the end, whatever failed here
                continue
        try:
            session.pause()
            session.receivers.each(
                "update_weights_from_disk", lambda control, _: control.load_folder(target, weight_version=version)
            )
        except (Abandoned, RunError):
            self._board.abandon()
            raise
        self._remove_others(target)

    def leave(self, receivers: Receivers) -> None:
        """The newest weights stay: a server that is started again by its owner may read them."""

    def _write(self, stream: Iterator[tuple[str, Tensor]], target: Path, expected: ExpectedChecksums) -> None:
        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in stream:
                expected.add(name, tensor)
                yield name, tensor

        shutil.rmtree(target, ignore_errors=True)  # of an attempt that a server's death ended
        try:
            write_hf_folder(noted(), self._actor.source_folder, target, max_shard_size=self._shard_bytes)
        except (OSError, UserError) as error:
            raise RunError(f"the weights could not be written to {target}: {error}") from error

    def _remove_others(self, target: Path) -> None:
        for old in self._folder.glob(f"{PREFIX}*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
