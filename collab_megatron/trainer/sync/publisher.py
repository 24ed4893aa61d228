"""Publishes the actor's weights: one version, to every server that answers, proved before it is used.

Every trainer rank calls `publish`; rank 0 talks to the servers. A server that fails on the way is given up and the
others get the weights in another attempt; one that came back since is taken in. Only what a sync has reached is `live`,
and the driver hears of nothing else: a restarted server is not used before it holds the newest weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from collab_megatron.config.sections import EngineSection, SyncSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import on_rank_zero
from collab_megatron.trainer.sync.attempt import Abandoned, Attempt, shared_store
from collab_megatron.trainer.sync.broadcast_transport import BroadcastTransport
from collab_megatron.trainer.sync.disk_transport import DiskTransport
from collab_megatron.trainer.sync.ipc_transport import IpcTransport
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums, compare, merge, skip_patterns, units_of_sync
from collab_megatron.trainer.sync.proof.engine_layout import Device
from collab_megatron.trainer.sync.proof.probe import largest_gap, trainer_logprobs
from collab_megatron.trainer.sync.servers import MEMORY_TAGS, EnginesLost, SyncServers
from collab_megatron.trainer.sync.transport import Transport
from collab_megatron.wire.roster import EngineEntry, RosterFolder

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
class _Outcome:
    """How an attempt went on one rank."""

    kind: str  # ok | lost | abandoned | error
    text: str = ""
    checksums: Mapping[str, Sequence[str]] = field(default_factory=dict)


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
        """`roster`: the launcher's folder (wire/roster.py). `probe_ids`: token ids of the probe prompt, at least 2.
        `weights_dir`: where the disk transport writes unless sync.disk_dir names a folder. `engine_keys`: what the
        servers ask for; rank 0's count. Collective."""
        grid = actor.grid
        self._actor, self._engine, self._sync, self._probe_ids = actor, engine, sync, tuple(probe_ids)
        # other ranks wait here while rank 0 waits for servers, so its deadline is above all of theirs
        longest = engine.wait_s + 10 * sync.timeout_s + MARGIN_S
        self._all_ranks = dist.new_group(backend="gloo", timeout=timedelta(seconds=longest))
        self._store = shared_store(self._all_ranks, grid.rank, timeout_s=sync.timeout_s)
        self._servers: SyncServers | None = None
        if grid.is_main:
            self._servers = SyncServers(
                RosterFolder(roster),
                timeout_s=sync.timeout_s,
                wait_s=engine.wait_s,
                pause_mode=sync.pause,
                keys=engine_keys,
            )
        self._transport = self._make_transport(weights_dir)
        self._attempts = 0  # of all syncs
        self._syncs = 0  # that succeeded
        self._seen: set[EngineEntry] = set()  # checked as a whole before
        self._released: set[tuple[EngineEntry, str]] = set()  # server, tag of the memory that it has given back

    def _make_transport(self, weights_dir: Path) -> Transport:
        actor, servers, sync = self._actor, self._servers, self._sync
        bucket_bytes = int(sync.bucket_mb_on(actor.grid.device.type) * 2**20)
        match sync.transport_for(self._engine.placement):
            case "disk":
                return DiskTransport(actor, servers, sync.disk_dir or weights_dir, shard_bytes=bucket_bytes)
            case "ipc":
                return IpcTransport(actor, servers, bucket_bytes)
            case "broadcast":
                return BroadcastTransport(
                    actor, servers, bucket_bytes, all_ranks=self._all_ranks, timeout_s=sync.timeout_s
                )

    @property
    def servers(self) -> SyncServers:
        if self._servers is None:
            raise RuntimeError("only rank 0 talks to the engines")
        return self._servers

    @property
    def live_urls(self) -> tuple[str, ...]:
        """The servers that hold the newest weights; empty on ranks other than 0."""
        return tuple(entry.url for entry in self._servers.live) if self._servers else ()

    @property
    def control(self) -> EngineControl:
        """Of the first live server. Rank 0."""
        return self.servers.control(self.servers.live[0])

    def forget(self, lost: Mapping[str, str]) -> None:
        """Give up servers that the driver found dead: URL -> why. Rank 0; a no-op elsewhere."""
        if self._servers is None:
            return
        for entry in self._servers.live:
            if entry.url in lost:
                self._servers.give_up(entry, lost[entry.url])

    def make_room(self) -> None:
        """Colocated engines give their device memory back until the next publish; what they still sample is aborted.
        Collective."""
        if self._engine.placement != "colocated":
            return

        def release() -> None:
            servers = self.servers
            servers.members = servers.live
            servers.release_memory()
            self._released = {(entry, tag) for entry in servers.members for tag in MEMORY_TAGS}

        on_rank_zero(self._actor.grid, release, group=self._all_ranks)

    def publish(self, version: int) -> SyncReport:
        """Send all weights, prove them and make them `version`. Collective: every trainer rank calls it.

        Raises on every rank: RunError before anything is sent where the trainer's own log-probs are not finite;
        NoEngineLeft if no server came within `engine.wait_s`; RunError naming rank, bucket, call and server where
        something else fails; WeightsDiffer naming tensor and server where the proof does: the servers stay paused
        then, since they must not serve unproved weights.
        """
        start = time.monotonic()
        probe = trainer_logprobs(self._actor, self._probe_ids)
        if not all(map(math.isfinite, probe)):  # alike on every rank; the weights themselves are checked elsewhere
            raise RunError(
                f"the trainer's own log-probs of the probe prompt are not finite at version {version}: nothing was "
                "sent to the engines; lower optimizer.lr, then go on from an earlier checkpoint"
            )
        for number in range(1, MAX_ATTEMPTS + 1):
            self._free_cache()
            dist.barrier(group=self._all_ranks)  # rank 0 has the engines take their memory back
            try:
                members = on_rank_zero(self._actor.grid, self._find, group=self._all_ranks)
            except EnginesLost:
                continue
            self._attempts += 1
            attempt = Attempt(
                self._store,
                number=self._attempts,
                rank=self._actor.grid.rank,
                members=members,
                timeout_s=self._sync.timeout_s,
            )
            is_new = any(member not in self._seen for member in members)
            units = units_of_sync(self._actor.spec, 0 if is_new else self._syncs, self._sync.verify_every)
            expected = self._deliver(attempt, version, units)
            if expected is None:
                continue
            try:
                finish = partial(self._finish, version, units, expected, probe)
                report = on_rank_zero(self._actor.grid, finish, group=self._all_ranks)
            except EnginesLost:
                continue
            self._seen |= set(members)
            self._syncs += 1
            total = sum(tensor.num_bytes for tensor in self._actor.tensor_plan())
            return replace(report, seconds=time.monotonic() - start, bytes=total, attempts=number)
        raise RunError(f"{MAX_ATTEMPTS} attempts to publish version {version} lost servers: see the engines' logs")

    def _find(self) -> tuple[EngineEntry, ...]:
        """Rank 0: the servers of an attempt, with memory for the weights. Here and not in `_deliver`: an error there
        would keep this rank from gathers that the others are in.

        Raises EnginesLost when none has taken its memory back.
        """
        members = self.servers.find()
        if len({member.ranks for member in members}) > 1:
            raise RunError("the engines have different numbers of tensor-parallel ranks")
        if self._released:
            self._resume_memory("weights")
        return self.servers.members

    def _deliver(self, attempt: Attempt, version: int, units: frozenset[int]) -> dict[str, list[str]] | None:
        """The checksums of all that was sent, on every rank; None: servers were lost, start over."""
        actor = self._actor
        device: Device = "cpu" if actor.grid.device.type == "cpu" else "cuda"
        expected = ExpectedChecksums(actor.spec, actor.dtype, attempt.members[0].ranks, units, device=device)
        try:
            self._transport.deliver(attempt, version, expected)
            outcome = _Outcome("ok", checksums=expected.result())
        except EnginesLost as error:
            outcome = _Outcome("lost", str(error))
        except Abandoned:
            outcome = _Outcome("abandoned")
        except RunError as error:
            outcome = _Outcome("error", str(error))
        self._free_cache()  # the buffers of the sync, before the engines take memory for their KV cache
        outcomes: list[_Outcome] = [outcome] * actor.grid.world_size
        dist.all_gather_object(outcomes, outcome, group=self._all_ranks)
        attempt.close()
        if outcomes[0].kind == "lost":
            return None
        for one in outcomes:
            if one.kind == "error":
                raise RunError(one.text)
        if any(one.kind == "abandoned" for one in outcomes):
            raise RunError("a rank abandoned the sync without an error of its own")
        return merge(one.checksums for one in outcomes)

    def _free_cache(self) -> None:
        """Give back what torch has cached on this rank's GPU: the engine on the same GPU cannot use it."""
        if self._engine.placement == "colocated" and self._actor.grid.device.type == "cuda":
            torch.cuda.ipc_collect()  # first the buckets that the engine has read and closed
            torch.cuda.empty_cache()

    def _finish(
        self,
        version: int,
        units: frozenset[int],
        expected: Mapping[str, Sequence[str]],
        probe: Sequence[float],
    ) -> SyncReport:
        """Rank 0: prove the weights, then let the servers go on.

        Raises EnginesLost when none is left, WeightsDiffer when the proof fails.
        """
        servers = self.servers
        start = time.monotonic()
        flushed = servers.flush()
        if units:
            skip = skip_patterns(self._actor.spec, units)

            def check(control: EngineControl, entry: EngineEntry) -> None:
                compare(expected, control.checksums(skip), str(entry))

            servers.call_survivors("weights_checker", check)
        proof_s = time.monotonic() - start
        if self._released:
            self._resume_memory("kv_cache")
            self._released = set()
        paused_s = servers.resume()
        key = f"probe of version {version}"
        by_engine = servers.call_survivors(
            "the probe prompt", lambda control, _: control.prompt_logprobs(self._probe_ids, cache_key=key)
        )
        gap = largest_gap(probe, by_engine, max_gap=self._sync.max_probe_gap, version=version)
        servers.live = servers.members
        return SyncReport(
            paused_s=paused_s,
            proof_s=proof_s,
            engines=len(servers.live),
            checked=len(expected),
            probe_gap=gap,
            flushed=flushed,
            lost=servers.take_lost(),
        )

    def _resume_memory(self, tag: str) -> None:
        """A server that was started since then holds its memory already, and so does one that took it back in an
        attempt that failed: asked twice, it would end."""

        def resume(control: EngineControl, entry: EngineEntry) -> None:
            if (entry, tag) in self._released:
                control.resume_memory([tag])
                self._released.discard((entry, tag))

        self.servers.call_survivors("resume_memory_occupation", resume)

    def close(self) -> None:
        """Leave servers that outlive the run as they were found."""
        self._transport.close()
        if self._servers is not None:
            self._servers.close()
