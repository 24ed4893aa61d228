"""Publish the actor's weights: pause -> begin -> buckets -> end -> continue, and the version goes up.

Every trainer rank takes part in gathering; rank 0 alone talks to the engine and sends. Transport: broadcast in a group
of rank 0 and the engine's ranks (`update_weights_from_distributed`), gloo on CPU, NCCL on GPU.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from collab_megatron.actor.actor import Actor
from collab_megatron.cluster.processes import free_port
from collab_megatron.config.sections import SyncSection
from collab_megatron.convert.exporter import TensorInfo
from collab_megatron.engine.control import EngineControl
from collab_megatron.errors import RunError
from collab_megatron.resharding.buckets import cut_buckets, dtype_name
from collab_megatron.resharding.update_group import join_as_sender


@dataclass(frozen=True)
class SyncReport:
    """One publish, as logged."""

    seconds: float
    paused_s: float  # time during which the engine produced no token
    bytes: int


class _Call(threading.Thread):
    """An engine call that runs beside the collective it belongs to; its error is raised by `finish`."""

    def __init__(self, what: str, target: object, **kwargs: object) -> None:
        super().__init__(name=what, daemon=True)
        self._call, self._kwargs = target, kwargs
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call(**self._kwargs)  # type: ignore[operator]
        except RunError as error:  # re-raised by finish() in the caller's thread
            self._error = error

    def finish(self, timeout_s: float) -> None:
        self.join(timeout_s)
        if self.is_alive():
            raise RunError(f"trainer rank 0: {self.name} did not end within {timeout_s:g} s")
        if self._error is not None:
            raise self._error


class Publisher:
    """Holds the update group of one engine. Build and use it on every trainer rank alike."""

    def __init__(self, actor: Actor, *, engine_url: str, engine_ranks: int, sync: SyncSection) -> None:
        self._actor = actor
        self._sync = sync
        self._buckets = cut_buckets(actor.tensor_plan(), sync.bucket_mb * 2**20)
        # of this run alone: an engine that outlives a run may still hold the group of one that was killed
        self._group_name = f"collab_megatron_{uuid.uuid4().hex[:12]}"
        self._control: EngineControl | None = None
        self._group: dist.ProcessGroup | None = None
        if actor.grid.is_main:
            self._control = EngineControl(engine_url, timeout_s=sync.timeout_s)
            self._group = self._connect(self._control, engine_ranks)

    def _connect(self, control: EngineControl, engine_ranks: int) -> dist.ProcessGroup:
        world = {
            "address": "127.0.0.1",
            "port": free_port(),
            "world_size": 1 + engine_ranks,
            "group_name": self._group_name,
            "backend": self._actor.grid.backend.process_group,
        }
        joining = _Call(f"init_weights_update_group of {control.url}", control.init_update_group, **world)
        group = join_as_sender(**world, timeout_s=self._sync.timeout_s)  # type: ignore[arg-type]
        joining.finish(self._sync.timeout_s)
        return group

    @property
    def control(self) -> EngineControl:
        if self._control is None:
            raise RuntimeError("only rank 0 talks to the engine")
        return self._control

    def publish(self, version: int) -> SyncReport:
        """Send all weights and make them `version`. Collective: every trainer rank calls it.

        Raises RunError naming bucket, call and engine; the engine stays paused then: it must not serve half-new
        weights.
        """
        start = time.monotonic()
        stream = self._actor.hf_tensors()
        if self._control is None or self._group is None:
            for _ in stream:  # take part in the gathering
                pass
            return SyncReport(seconds=time.monotonic() - start, paused_s=0.0, bytes=0)
        self._control.pause()
        paused = time.monotonic()
        self._control.begin_update()
        for number, bucket in enumerate(self._buckets):
            last = number == len(self._buckets) - 1
            self._send(stream, bucket, number, version if last else None)
        if next(stream, None) is not None:
            raise AssertionError("the export stream holds more tensors than its plan")
        self._control.end_update()
        self._control.resume()
        end = time.monotonic()
        total = sum(tensor.num_bytes for bucket in self._buckets for tensor in bucket)
        return SyncReport(seconds=end - start, paused_s=end - paused, bytes=total)

    def _send(
        self, stream: Iterator[tuple[str, Tensor]], bucket: Sequence[TensorInfo], number: int, version: int | None
    ) -> None:
        control = self.control
        receiving = _Call(
            f"update_weights_from_distributed (bucket {number}) of {control.url}",
            control.receive_bucket,
            names=[tensor.name for tensor in bucket],
            dtypes=[dtype_name(tensor.dtype) for tensor in bucket],
            shapes=[tensor.shape for tensor in bucket],
            group_name=self._group_name,
            weight_version=version,
        )
        for expected in bucket:
            name, tensor = next(stream)
            if name != expected.name or tuple(tensor.shape) != tuple(expected.shape):
                raise AssertionError(f"export stream gives {name} {tuple(tensor.shape)}, planned {expected}")
            try:
                dist.broadcast(tensor, src=0, group=self._group)
            except RuntimeError as error:
                receiving.finish(1.0)  # the engine's own word, if it has one, says more
                raise RunError(f"trainer rank 0 could not send {name} to {control.url}: {error}") from None
        receiving.finish(self._sync.timeout_s)

    def close(self) -> None:
        """Leave the engine as it was found: the group is dissolved."""
        if self._control is not None:
            self._control.destroy_update_group(self._group_name)
            self._control.close()
