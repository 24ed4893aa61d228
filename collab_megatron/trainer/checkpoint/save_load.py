"""Save and load an Actor's whole training state. Collective: every rank of the grid takes part.

A save is written to a temporary folder, marked complete, then renamed: a crash at any moment leaves the earlier
checkpoints whole and nothing that looks like a newer one. It has two halves: `begin_save` collects the state,
`PendingSave.finish` writes it, on another thread with async_save.py. A failure on one rank is raised on all.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from collab_megatron.errors import DiskFull, RunError, UserError
from collab_megatron.files import fsync_folder
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import fail_together, gather
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.checkpoint.reader import load_sharded, read_common, read_metadata, refusal
from collab_megatron.trainer.checkpoint.state import PROGRESS, ShardedState, grid_of, layout_of
from collab_megatron.trainer.checkpoint.writer import DeferredSave, write_tensors
from collab_megatron.trainer.convert.disk_space import free_bytes
from collab_megatron.trainer.convert.hf_folder import copy_companions
from collab_megatron.wire.checkpoints import CheckpointInfo, read_info, retire, step_folder, write_best, write_marker

_BALLAST = ".ballast"
_BALLAST_BYTES = 2**18


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints are kept after a save."""

    last: int = 1  # this many of the newest
    every: int = 0  # also those whose step is a multiple of this; 0: no others
    best_loss: float | None = None  # held-out loss of the one being saved, if it is the lowest so far


def save_checkpoint(actor: Actor, directory: Path, *, step: int, extra: Mapping[str, Any], keep_last: int) -> Path:
    """Write directory/step_XXXXXXXX and remove the checkpoints that are not kept; returns the folder.

    extra: JSON, the same on every rank. Raises RunError on every rank if the checkpoint could not be written; the
    attempt is removed and the earlier checkpoints are as they were.
    """
    keep = Retention(keep_last)
    return begin_save(actor, directory, step=step, extra=extra, keep=keep, copy=False).finish(actor.grid)


def load_checkpoint(actor: Actor, folder: Path) -> CheckpointInfo:
    """Fill the actor, under any layout, from a complete checkpoint, without executing anything from its files.

    Raises UserError if the checkpoint is incomplete, hostile, of another model or dtype, or has weights that are NaN or
    infinite; RunError if its files cannot be read.
    """
    info = read_info(folder)
    _check_fits(actor, info)
    if actor.optimizer is not None and not info.layout.get("optimizer"):
        raise UserError(f"{folder} holds weights only: start from it with run.init_from={folder}")
    same = all(info.layout.get(key, 1) == value for key, value in grid_of(actor).items())
    _fill(actor, info, optimizer=True, random_states=same and actor.optimizer is not None)
    _require_finite(actor, folder)
    return info


def load_weights(actor: Actor, folder: Path) -> CheckpointInfo:
    """Fill only the actor's weights, under any layout. Its optimizer stays new; its master weights follow the weights.

    Raises as load_checkpoint does.
    """
    info = read_info(folder)
    _check_fits(actor, info)
    _fill(actor, info, optimizer=False, random_states=False)
    if actor.optimizer is not None:
        actor.optimizer.reload_model_params()
    _require_finite(actor, folder)
    return info


def _require_finite(actor: Actor, folder: Path) -> None:
    name = actor.not_finite()
    if name is not None:
        raise UserError(
            f"{folder} holds weights that are NaN or infinite ({name}): its files are damaged or its training "
            "diverged; move it away and use an earlier checkpoint"
        )


def _fill(actor: Actor, info: CheckpointInfo, *, optimizer: bool, random_states: bool) -> None:
    folder = info.folder
    progress = read_common(info.model_folder / "common.pt").get(PROGRESS, {})
    metadata = read_metadata(info.model_folder / ".metadata")
    state = ShardedState(actor, loading=True, random_states=random_states, optimizer=optimizer)
    try:
        loaded = load_sharded(state.tree, info.model_folder, metadata, actor.grid.cpu_group)
    except (Exception, CheckpointException) as error:
        # torch's CheckpointException is a BaseException
        if sentence := refusal(info.model_folder, error):
            raise UserError(sentence) from error
        raise RunError(f"rank {actor.grid.rank} cannot read the checkpoint {folder}: {_reason(error)}") from error
    state.restore(loaded, progress)


def _check_fits(actor: Actor, info: CheckpointInfo) -> None:
    here = layout_of(actor)
    fixed = {"architecture": "model.path", "num_params": "model.path"}
    if actor.optimizer is not None:
        fixed["dtype"] = "model.dtype"
    for key, setting in fixed.items():
        if info.layout.get(key) != here[key]:
            raise UserError(
                f"{info.folder} has {key} {info.layout.get(key)!r}, but this run has {here[key]!r}: set {setting} as "
                "the run that saved it did, or choose another run.dir or run.init_from"
            )


@dataclass
class PendingSave:
    """A checkpoint whose state is collected but not yet written."""

    final: Path
    step: int
    layout: Mapping[str, Any]
    extra: Mapping[str, Any]
    keep: Retention
    bytes_needed: int
    tensors: dict[str, Any] = field(default_factory=dict)  # of this rank

    @property
    def aside(self) -> Path:
        return self.final.with_name(self.final.name + ".tmp")

    def finish(self, grid: RankGrid) -> Path:
        """Write, publish, remove the checkpoints that are not kept. Collective over grid.cpu_group.

        Raises RunError on every rank like save_checkpoint.
        """
        directory = self.final.parent
        with self.atomic_folder(grid):
            with fail_together(grid, "writing the tensors", self.aside):
                tensors, self.tensors = self.tensors, {}
                write_tensors(tensors, self.aside / "model", grid.cpu_group)
            with fail_together(grid, "publishing", directory):
                if grid.is_main:
                    self._publish()
                    if self.keep.best_loss is not None:
                        write_best(directory, self.step, self.keep.best_loss)
                    retire(directory, self.keep.last, self.keep.every)
        return self.final

    def _publish(self) -> None:
        fsync_folder(self.aside / "model")
        fsync_folder(self.aside / "hf")
        write_marker(self.aside, step=self.step, layout=self.layout, extra=self.extra)
        fsync_folder(self.aside)
        replaced = self.final.with_name(self.final.name + ".replaced.tmp")
        if self.final.exists():  # the same step again; retire() removes the earlier one
            self.final.rename(replaced)
        self.aside.rename(self.final)
        fsync_folder(self.final.parent)

    @contextlib.contextmanager
    def atomic_folder(self, grid: RankGrid) -> Iterator[None]:
        """The block succeeds on every rank; otherwise rank 0 removes the attempt and every rank raises RunError."""
        directory = self.final.parent
        try:
            yield
        except (RunError, UserError) as failure:
            if grid.is_main:
                shutil.rmtree(self.aside, ignore_errors=True)
            if isinstance(failure, DiskFull):
                missing = max(1, (self.bytes_needed - free_bytes(directory)) // 10**6 + 1)
                raise RunError(
                    f"disk full while saving to {directory}; earlier checkpoints are whole; free {missing} MB and "
                    "resume"
                ) from failure
            raise RunError(f"saving to {directory} failed ({failure}); earlier checkpoints are whole") from failure


def begin_save(
    actor: Actor, directory: Path, *, step: int, extra: Mapping[str, Any], keep: Retention, copy: bool
) -> PendingSave:
    """Collect the state of a checkpoint. copy: to the host, so that training can go on before it is written.

    Raises RunError on every rank like save_checkpoint.
    """
    pending = PendingSave(
        final=step_folder(directory, step),
        step=step,
        layout=layout_of(actor),
        extra=extra,
        keep=keep,
        bytes_needed=_bytes_needed(actor),
    )
    with pending.atomic_folder(actor.grid):
        with fail_together(actor.grid, "preparing the folder", pending.final.parent):
            if actor.grid.is_main:
                _prepare(actor, pending.aside)
        pending.tensors = _collect(actor, pending.aside / "model", copy=copy)
    return pending


def _prepare(actor: Actor, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "model").mkdir(parents=True)
    (aside / "hf").mkdir()
    copy_companions(actor.source_folder, aside / "hf")
    # reserves space for metadata.json, which rank 0 writes while the other ranks wait in a barrier
    (aside / _BALLAST).write_bytes(b"\0" * _BALLAST_BYTES)


class _OtherRankFailed(Exception):
    """Another rank failed before megatron's save reached `before`; fail_together raises its error."""


def _collect(actor: Actor, folder: Path, *, copy: bool) -> dict[str, Any]:
    """Run megatron's save up to the tensors, and return these. Collective; if one rank fails, all raise."""
    grid, reached = actor.grid, False

    def before() -> None:
        nonlocal reached
        reached = True
        if any(gather(grid, False)):
            raise _OtherRankFailed
        if grid.is_main:
            (folder.parent / _BALLAST).unlink()

    saving = DeferredSave(before, copy=copy)
    with fail_together(grid, "collecting the state", folder), contextlib.suppress(_OtherRankFailed):
        try:
            state = ShardedState(actor, loading=False, random_states=actor.optimizer is not None)
            with torch.no_grad():
                saving.save({**state.tree, PROGRESS: state.progress}, folder)
        except Exception:
            if not reached:
                gather(grid, True)  # the other ranks wait in before()
            raise
        if saving.failure is not None:
            raise saving.failure
    return saving.tensors


def _reason(error: BaseException) -> str:
    """One line about the error; about the first rank's, for torch's CheckpointException."""
    failures = getattr(error, "failures", None)  # rank -> (exception, traceback)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _bytes_needed(actor: Actor) -> int:
    """Size of one checkpoint: weights, fp32 master weights for bf16, two moments."""
    fp32_copies = 0 if actor.optimizer is None else 2 if actor.dtype == torch.float32 else 3
    return actor.num_params * (actor.dtype.itemsize + 4 * fp32_copies)
