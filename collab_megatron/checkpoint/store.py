"""Save and load an Actor's whole training state. Collective: every rank of the grid takes part.

A save is written aside, marked complete, then renamed, so a crash at any moment leaves the earlier checkpoints whole
and nothing that looks like a newer one. Every failure on any rank is heard by all before one of them raises.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from collab_megatron.actor.actor import Actor
from collab_megatron.actor.grid import agree
from collab_megatron.checkpoint.folders import CheckpointInfo, read_info, retire, step_folder, write_marker
from collab_megatron.checkpoint.state import layout_of, restore, sharded_state
from collab_megatron.checkpoint.writer import InProcessSave
from collab_megatron.convert.disk import free_bytes, fsync_folder, is_disk_full
from collab_megatron.convert.hf_folder import copy_companions
from collab_megatron.errors import RunError, UserError

logger = logging.getLogger(__name__)

_BALLAST = ".ballast"
_BALLAST_BYTES = 2**18


def save_checkpoint(actor: Actor, directory: Path, *, step: int, extra: Mapping[str, Any], keep_last: int) -> Path:
    """Write directory/step_XXXXXXXX and retire the oldest beyond `keep_last`; returns the folder.

    `extra`: JSON, the same on every rank. Raises RunError on every rank if it could not be written, with nothing left
    of the attempt and the earlier checkpoints as they were.
    """
    final = step_folder(directory, step)
    aside = final.with_name(final.name + ".tmp")
    needed = _bytes_needed(actor)
    rank_zero = _on_rank_zero(actor)
    try:
        rank_zero(lambda: _prepare(actor, aside))
        _save_tensors(actor, aside / "model")
        rank_zero(lambda: _publish(actor, aside, final, step, extra))
    except _SaveFailed as failed:
        rank_zero(lambda: shutil.rmtree(aside, ignore_errors=True))
        if failed.disk_full:
            missing = max(1, (needed - free_bytes(directory)) // 10**6 + 1)
            raise RunError(
                f"disk full while saving to {directory}; earlier checkpoints are whole; free {missing} MB and resume"
            ) from failed
        raise RunError(f"saving to {directory} failed ({failed}); earlier checkpoints are whole") from failed
    rank_zero(lambda: retire(directory, keep_last))
    return final


def load_checkpoint(actor: Actor, folder: Path) -> CheckpointInfo:
    """Fill the actor (any tensor- and data-parallel size) from a complete checkpoint.

    Raises UserError where the checkpoint is torn or of another model, dtype or optimizer kind; RunError where its files
    cannot be read.
    """
    info = read_info(folder)
    here = layout_of(actor)
    fixed = ["architecture", "num_params"] + (["dtype", "distributed_optimizer"] if actor.optimizer else [])
    for key in fixed:
        if info.layout.get(key) != here[key]:
            raise UserError(f"{folder} has {key} {info.layout.get(key)!r}; this run has {here[key]!r}")
    if actor.optimizer is not None and not info.layout.get("optimizer"):
        raise UserError(f"{folder} holds weights only; convert it with megatron-to-hf and start from that folder")
    same = all(info.layout.get(key) == here[key] for key in ("tensor", "data", "device"))
    state = sharded_state(actor, loading=True, random_states=same and actor.optimizer is not None)
    try:
        loaded = dist_checkpointing.load(state, str(info.model_folder))
    except (OSError, RuntimeError, KeyError, EOFError) as error:
        raise RunError(f"rank {actor.grid.rank} cannot read the checkpoint {folder}: {error}") from error
    restore(actor, loaded)
    return info


class _SaveFailed(Exception):
    """Heard on every rank: what the first failing rank said."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(said[0].replace(_FULL, ""))
        self.disk_full = any(_FULL in text for text in said)


_FULL = "[disk full] "


def _describe(error: BaseException, folder: Path) -> str:
    mark = _FULL if is_disk_full(error, folder) else ""
    return f"{mark}{type(error).__name__}: {error}".splitlines()[0]


def _on_rank_zero(actor: Actor) -> Callable[[Callable[[], None]], None]:
    """A runner: rank 0 acts, all ranks hear how it went and raise _SaveFailed alike."""

    def run(action: Callable[[], None]) -> None:
        failure: str | None = None
        if actor.grid.is_main:
            try:
                action()
            except OSError as error:
                failure = _describe(error, Path(error.filename or "."))
        if said := agree(actor.grid, failure):
            raise _SaveFailed(said)

    return run


def _prepare(actor: Actor, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "model").mkdir(parents=True)
    (aside / "hf").mkdir()
    copy_companions(actor.source_folder, aside / "hf")
    # keeps room for the few small files written last, among them one of upstream's whose failure on rank 0 would leave
    # the other ranks in a barrier
    (aside / _BALLAST).write_bytes(b"\0" * _BALLAST_BYTES)


def _save_tensors(actor: Actor, folder: Path) -> None:
    """Megatron's save, with every rank's failure told to all. Raises _SaveFailed."""
    reached = False

    def before() -> None:
        nonlocal reached
        reached = True
        if said := agree(actor.grid, None):
            raise _SaveFailed(said)

    def after() -> None:
        if actor.grid.is_main:
            (folder.parent / _BALLAST).unlink()

    strategy = InProcessSave(actor.grid.cpu_group, before, after)
    failure: str | None = None
    try:
        state = sharded_state(actor, loading=False, random_states=actor.optimizer is not None)
        with torch.no_grad():
            dist_checkpointing.save(state, str(folder), strategy)
    except _SaveFailed as heard:
        logger.debug("rank %d heard: %s", actor.grid.rank, heard)  # rank 0 says it again below, to all at once
    except (Exception, CheckpointException) as error:
        # torch's CheckpointException is a BaseException
        failure = _describe(error, folder)
        if not failure.startswith(_FULL):
            logger.exception("rank %d: saving to %s failed", actor.grid.rank, folder)
    if not reached:
        agree(actor.grid, failure)  # the others are waiting in before()
    if said := agree(actor.grid, failure):
        raise _SaveFailed(said)


def _publish(actor: Actor, aside: Path, final: Path, step: int, extra: Mapping[str, Any]) -> None:
    fsync_folder(aside / "model")
    fsync_folder(aside / "hf")
    write_marker(aside, step=step, layout=layout_of(actor), extra=extra)
    fsync_folder(aside)
    replaced = final.with_name(final.name + ".replaced.tmp")
    if final.exists():  # the same step again; retire() removes what was there
        final.rename(replaced)
    aside.rename(final)
    fsync_folder(final.parent)


def _bytes_needed(actor: Actor) -> int:
    """Of one checkpoint: weights, fp32 master weights in bf16, two moments."""
    fp32_copies = 0 if actor.optimizer is None else 2 if actor.dtype == torch.float32 else 3
    return actor.num_params * (actor.dtype.itemsize + 4 * fp32_copies)
