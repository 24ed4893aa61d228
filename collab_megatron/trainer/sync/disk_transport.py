"""Transport `disk`: a folder of safetensors files that appears in one piece, for servers outside the job.

It is written before the servers are paused; they pause only to read it. Only the newest folder is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from collab_megatron.errors import RunError, UserError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.convert.hf_folder import write_hf_folder
from collab_megatron.trainer.sync.attempt import Abandoned, Attempt
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums
from collab_megatron.trainer.sync.servers import SyncServers

PREFIX = "weights-v"


class DiskTransport:
    """`folder` must be the same for trainer and servers: on a cluster, on a shared file system."""

    def __init__(self, actor: Actor, servers: SyncServers | None, folder: Path, *, shard_bytes: int) -> None:
        """`servers` on rank 0."""
        self._actor, self._servers = actor, servers
        self._folder = folder.absolute()
        self._shard_bytes = shard_bytes

    def deliver(self, attempt: Attempt, version: int, expected: ExpectedChecksums) -> None:
        """As in Transport."""
        stream = self._actor.hf_tensors()
        target = self._folder / f"{PREFIX}{version:08d}"
        try:
            if self._servers:
                self._write(stream, target, expected)
        finally:
            for _ in stream:  # every rank gathers to the end, whatever failed here
                continue
        if self._servers is None:
            return
        try:
            self._servers.pause()
            self._servers.call_all(
                "update_weights_from_disk", lambda control, _: control.load_folder(target, weight_version=version)
            )
        except (Abandoned, RunError):
            attempt.abandon()
            raise
        for old in self._folder.glob(f"{PREFIX}*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """The newest weights stay: a server that its owner starts again may read them."""

    def _write(self, stream: Iterator[tuple[str, Tensor]], target: Path, expected: ExpectedChecksums) -> None:
        def hashed() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in stream:
                expected.add(name, tensor)
                yield name, tensor

        shutil.rmtree(target, ignore_errors=True)  # left by an attempt that lost a server
        try:
            write_hf_folder(hashed(), self._actor.source_folder, target, max_shard_size=self._shard_bytes)
        except (OSError, UserError) as error:
            raise RunError(f"the weights could not be written to {target}: {error}") from error
