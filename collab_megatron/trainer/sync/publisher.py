"""Publish the actor's weights: pause -> begin -> buckets -> end -> version -> proof -> continue.

Every trainer rank calls `publish`; rank 0 talks to the servers. A server that fails on the way is given up and the
others get the weights all the same; one that came back since is taken in. Only what a sync has reached is `live`, and
the driver is told of nothing else: no server goes from dead to healthy without the newest weights and their proof.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from collab_megatron.config.sections import EngineSection, SyncSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import NoEngineLeft, RunError, WeightsDiffer
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.sync.attempt import Abandoned, Board
from collab_megatron.trainer.sync.broadcast_transport import BroadcastTransport
from collab_megatron.trainer.sync.bucket_transport import BucketDelivery, Delivery
from collab_megatron.trainer.sync.disk_transport import DiskDelivery
from collab_megatron.trainer.sync.ipc_transport import IpcTransport
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums, compare, merge, skip_patterns, units_of_sync
from collab_megatron.trainer.sync.proof.engine_layout import Device
from collab_megatron.trainer.sync.proof.probe import largest_gap, trainer_logprobs
from collab_megatron.trainer.sync.servers import EnginesLost, Receivers
from collab_megatron.trainer.sync.session import Session
from collab_megatron.wire.roster import EngineEntry, RosterFolder

T = TypeVar("T")
MARGIN_S = 60.0
MAX_ATTEMPTS = 10


@dataclass(frozen=True)
class SyncReport:
    """One publish, as logged; zeros on ranks other than 0."""

    seconds: float = 0.0
    paused_s: float = 0.0  # time during which no engine that was there all along produced a token
    proof_s: float = 0.0  # of these: checksums
    bytes: int = 0  # of weights, to each engine
    engines: int = 0  # that hold the new weights
    attempts: int = 0  # above 1: servers failed on the way
    checked: int = 0  # engine tensors whose checksums were compared, on each engine
    probe_gap: float = 0.0  # mean |trainer - engine| log-prob of the probe prompt, of the engine furthest off
    flushed: bool = True  # False: requests in flight kept a server's old prefix cache alive
    lost: Mapping[str, str] = field(default_factory=dict)  # server -> why it was given up since the last sync

    def metrics(self) -> dict[str, float]:
        """By dashboard name."""
        named = {name: float(value) for name, value in vars(self).items() if isinstance(value, int | float)}
        del named["bytes"]
        return {f"sync/{name}": value for name, value in named.items()} | {
            "sync/mb": self.bytes / 2**20,
            "sync/engines_lost": len(self.lost),
        }


@dataclass(frozen=True)
class _Said:
    """What one rank has to say after an attempt."""

    kind: str  # ok | lost | abandoned | error
    text: str
    checksums: Mapping[str, Sequence[str]]


class Publisher:
    """Build and use it on every trainer rank alike."""

    def __init__(
        self,
        actor: Actor,
        *,
        roster: Path,
        engine: EngineSection,
        sync: SyncSection,
        probe_ids: Sequence[int],
        weights_dir: Path,
        engine_keys: EngineKeys | None = None,
    ) -> None:
        """`roster`: the launcher's folder (engine/roster.py). `probe_ids`: token ids of the probe prompt, at least 2.
        `weights_dir`: of the disk transport, where sync.disk_dir names none. `engine_keys`: what the servers ask for;
        rank 0's count. Collective."""
        grid = actor.grid
        self._actor, self._engine, self._sync, self._probe_ids = actor, engine, sync, tuple(probe_ids)
        # other ranks wait here while rank 0 waits for servers, so its deadline is above all of theirs
        longest = engine.wait_s + 10 * sync.timeout_s + MARGIN_S
        self._talk = dist.new_group(backend="gloo", timeout=timedelta(seconds=longest))
        self._board = Board(self._talk, grid.rank, timeout_s=sync.timeout_s)
        self._delivery = self._make_delivery(weights_dir)
        self._receivers: Receivers | None = None
        if grid.is_main:
            self._receivers = Receivers(
                RosterFolder(roster), timeout_s=sync.timeout_s, wait_s=engine.wait_s, keys=engine_keys
            )
        self._syncs = 0  # that succeeded
        self._seen: set[EngineEntry] = set()  # checked as a whole before
        self._released: set[EngineEntry] = set()  # hold no device memory for weights

    def _make_delivery(self, weights_dir: Path) -> Delivery:
        grid, sync = self._actor.grid, self._sync
        bucket_bytes = int(sync.bucket_mb_on(grid.device.type) * 2**20)
        transport = sync.transport_for(self._engine.placement)
        if transport == "disk":
            folder = sync.disk_dir or weights_dir
            return DiskDelivery(self._actor, self._board, folder, shard_bytes=bucket_bytes)
        if transport == "ipc":
            return BucketDelivery(self._actor, self._board, IpcTransport(grid, self._board), bucket_bytes)
        groups = BroadcastTransport(grid, self._board, self._talk, timeout_s=sync.timeout_s)
        return BucketDelivery(self._actor, self._board, groups, bucket_bytes)

    @property
    def receivers(self) -> Receivers:
        if self._receivers is None:
            raise RuntimeError("only rank 0 talks to the engines")
        return self._receivers

    @property
    def live_urls(self) -> tuple[str, ...]:
        """The servers that hold the newest weights; empty on ranks other than 0."""
        return tuple(entry.url for entry in self._receivers.live) if self._receivers else ()

    @property
    def control(self) -> EngineControl:
        """Of the first live server. Rank 0."""
        return self.receivers.control(self.receivers.live[0])

    def forget(self, lost: Mapping[str, str]) -> None:
        """Give up servers that the driver found dead: URL -> why. Rank 0; a no-op elsewhere."""
        if self._receivers is None:
            return
        for entry in self._receivers.live:
            if entry.url in lost:
                self._receivers.give_up(entry, lost[entry.url])

    def make_room(self) -> None:
        """Colocated engines give their device memory back until the next publish; they must be idle. Collective."""
        if self._engine.placement != "colocated":
            return

        def release() -> None:
            receivers = self.receivers
            receivers.members = receivers.live
            session = Session(receivers, self._sync.pause)
            session.on_survivors(
                "release_memory_occupation", lambda control, _: control.release_memory(["kv_cache", "weights"])
            )
            self._released = set(receivers.members)

        self._from_main(release)

    def publish(self, version: int) -> SyncReport:
        """Send all weights, prove them and make them `version`. Collective: every trainer rank calls it.

        Raises on every rank: RunError before anything is sent where the weights make log-probs that are no numbers;
        NoEngineLeft if no server came within `engine.wait_s`; RunError naming rank, bucket, call and server where
        something else fails; WeightsDiffer naming tensor and server where the proof does: the servers
        stay paused then, since they must not serve weights that nobody vouches for.
        """
        start = time.monotonic()
        probe = trainer_logprobs(self._actor, self._probe_ids)
        if not all(map(math.isfinite, probe)):  # alike on every rank; the weights themselves are looked at elsewhere
            raise RunError(
                f"the trainer's own log-probs of the probe prompt are not finite at version {version}: nothing was "
                "sent to the engines; lower optimizer.lr, then go on from an earlier checkpoint"
            )
        for attempt in range(1, MAX_ATTEMPTS + 1):
            members = self._from_main(self._find)
            self._board.next_attempt()
            session = Session(self.receivers, self._sync.pause) if self._receivers else None
            new = any(member not in self._seen for member in members)
            units = units_of_sync(self._actor.spec, 0 if new else self._syncs, self._sync.verify_every)
            ranks = members[0].ranks
            device: Device = "cpu" if self._actor.grid.device.type == "cpu" else "cuda"
            expected = ExpectedChecksums(self._actor.spec, self._actor.dtype, ranks, units, device=device)
            said = self._attempt(members, version, session, expected)
            if said is None:
                continue

            try:
                report = self._from_main(partial(self._finish, version, session, units, said, probe))
            except EnginesLost:
                continue
            self._seen |= set(members)
            self._syncs += 1
            total = sum(tensor.num_bytes for tensor in self._actor.tensor_plan())
            return SyncReport(
                **{
                    **vars(report),
                    "seconds": time.monotonic() - start,
                    "bytes": total,
                    "attempts": attempt,
                }
            )
        raise RunError(f"{MAX_ATTEMPTS} attempts to publish version {version} lost servers: see the engines' logs")

    def _find(self) -> tuple[EngineEntry, ...]:
        members = self.receivers.find()
        if len({member.ranks for member in members}) > 1:
            raise RunError("the engines have different numbers of tensor-parallel ranks")
        return members

    def _attempt(
        self, members: Sequence[EngineEntry], version: int, session: Session | None, expected: ExpectedChecksums
    ) -> dict[str, list[str]] | None:
        """The checksums of all that was sent, on every rank; None: servers were lost, start over."""
        said = _Said("ok", "", {})
        try:
            if session and self._released:
                self._resume_memory(session, "weights")
            self._delivery.deliver(members, version, session, expected)
            said = _Said("ok", "", expected.result())
        except EnginesLost as error:
            said = _Said("lost", str(error), {})
        except Abandoned:
            said = _Said("abandoned", "", {})
        except RunError as error:
            said = _Said("error", str(error), {})
        every: list[_Said] = [said] * self._actor.grid.world_size
        dist.all_gather_object(every, said, group=self._talk)
        kinds = [one.kind for one in every]
        if kinds[0] == "lost":
            return None
        errors = [one.text for one in every if one.kind == "error"]
        if errors:
            raise RunError(errors[0])
        if "abandoned" in kinds:
            raise RunError("the sync was given up by a rank that did not say why")
        return merge(one.checksums for one in every)

    def _finish(
        self,
        version: int,
        session: Session | None,
        units: frozenset[int],
        expected: Mapping[str, Sequence[str]],
        probe: Sequence[float],
    ) -> SyncReport:
        """Rank 0: proof, then the servers go on.

        Raises EnginesLost when none is left, WeightsDiffer when the proof fails.
        """
        assert session is not None, "only rank 0 finishes"
        start = time.monotonic()
        session.flush()
        if units:
            skip = skip_patterns(self._actor.spec, units)

            def check(control: EngineControl, entry: EngineEntry) -> None:
                compare(expected, control.checksums(skip), str(entry))

            session.on_survivors("weights_checker", check)
        proof_s = time.monotonic() - start
        if self._released:
            self._resume_memory(session, "kv_cache")
            self._released = set()
        session.resume()
        receivers = session.receivers
        key = f"probe of version {version}"
        said: dict[EngineEntry, list[float]] = {}

        def score(control: EngineControl, entry: EngineEntry) -> None:
            said[entry] = control.prompt_logprobs(self._probe_ids, cache_key=key)

        session.on_survivors("the probe prompt", score)
        survivors = {entry: said[entry] for entry in receivers.members}
        gap = largest_gap(probe, survivors, max_gap=self._sync.max_probe_gap, version=version)
        receivers.live = receivers.members
        return SyncReport(
            paused_s=session.paused_s,
            proof_s=proof_s,
            engines=len(receivers.live),
            checked=len(expected),
            probe_gap=gap,
            flushed=session.flushed,
            lost=receivers.take_lost(),
        )

    def _resume_memory(self, session: Session, tag: str) -> None:
        """Servers that were started since hold their memory already."""

        def resume(control: EngineControl, entry: EngineEntry) -> None:
            if entry in self._released:
                control.resume_memory([tag])

        session.on_survivors("resume_memory_occupation", resume)

    def _from_main(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises on rank 0, on every rank. Collective."""
        said: list[tuple[T | None, type[RunError] | None, str]] = []
        failure: RunError | None = None
        if self._actor.grid.is_main:
            try:
                said = [(call(), None, "")]
            except RunError as error:
                failure = error
                kinds = (NoEngineLeft, EnginesLost, WeightsDiffer, RunError)
                known = next(kind for kind in kinds if isinstance(error, kind))
                said = [(None, known, str(error))]
        else:
            said = [(None, None, "")]
        dist.broadcast_object_list(said, src=0, group=self._talk)
        value, kind, text = said[0]
        if kind is not None:
            raise failure or kind(text)
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Leave servers that outlive the run as they were found."""
        if self._receivers is not None:
            self._delivery.leave(self._receivers)
            self._receivers.close()
