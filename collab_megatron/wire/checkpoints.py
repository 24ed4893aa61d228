"""Checkpoint folders: names, completeness marker, newest and best, retention. Pure: no torch.

checkpoints/NAME/
    step_00000040/          renamed from step_00000040.tmp once everything below is on disk
        model/              megatron's distributed checkpoint (torch_dist)
        hf/                 config, tokenizer, chat template: needed by the conversion
        complete.json       the marker, written last: step, layout, package versions, extra state
    best.json               the step with the lowest held-out loss, if the run measures one
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.files import atomic_write
from collab_megatron.wire.provenance import package_versions

MARKER = "complete.json"
BEST = "best.json"
FORMAT = 2
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class CheckpointInfo:
    """The marker of a complete checkpoint."""

    folder: Path
    step: int  # training steps done
    extra: dict[str, Any]  # JSON of the caller: config, data position, weight version
    layout: dict[str, Any]  # of state.layout_of: grid sizes, dtype, architecture, optimizer type
    versions: dict[str, str]  # of Python and packages at the time of writing

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def hf_folder(self) -> Path:
        return self.folder / "hf"


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint named by best.json."""

    folder: Path
    step: int
    loss: float  # held-out, in nats per token


def step_folder(directory: Path, step: int) -> Path:
    """The folder of the complete checkpoint of `step`."""
    return directory / f"step_{step:08d}"


def write_marker(folder: Path, *, step: int, layout: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Mark `folder` as complete. Raises TypeError if `extra` is not JSON."""
    content = {
        "format": FORMAT,
        "step": step,
        "layout": dict(layout),
        "versions": package_versions(),
        "extra": dict(extra),
    }
    (folder / MARKER).write_text(json.dumps(content, indent=2) + "\n")


def read_info(folder: Path) -> CheckpointInfo:
    """Read the marker. Raises UserError if `folder` is not a complete checkpoint of this format."""
    try:
        content = json.loads((folder / MARKER).read_text())
        found = content["format"]
        info = CheckpointInfo(
            folder, int(content["step"]), content["extra"], content["layout"], content.get("versions", {})
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a complete checkpoint: its {MARKER} is missing or unreadable; name another step folder"
        ) from error
    if found != FORMAT:
        raise UserError(
            f"{folder} is a checkpoint of format {found}; this version reads format {FORMAT}: use the "
            "version of collab_megatron that wrote it"
        )
    return info


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete step folders whose name and marker agree, oldest first."""
    found = []
    for folder in directory.glob("step_*") if directory.is_dir() else ():
        match = _NAME.fullmatch(folder.name)
        if match and _is_complete(folder, int(match[1])):
            found.append(folder)
    return sorted(found)


def newest_complete(directory: Path) -> Path | None:
    """The newest complete checkpoint; None without one."""
    return next(reversed(complete_checkpoints(directory)), None)


def named_checkpoint(path: Path) -> CheckpointInfo:
    """The checkpoint at a user's path: a complete step folder, or the newest one in a folder of them. Raises UserError
    if it is neither."""
    folder = path if (path / MARKER).is_file() else newest_complete(path)
    if folder is None:
        raise UserError(f"{path} is not a complete checkpoint and holds none: name a step folder, or a folder of them")
    return read_info(folder)


def write_best(directory: Path, step: int, loss: float) -> None:
    """Make the complete checkpoint of `step` the best one. The previous best one may be removed from now on."""
    best = {"step": step, "loss": loss, "folder": step_folder(directory, step).name}
    with atomic_write(directory / BEST) as temporary:
        temporary.write_text(json.dumps(best) + "\n")


def read_best(directory: Path) -> BestCheckpoint | None:
    """The checkpoint with the lowest held-out loss; None if there is none, or it was removed.

    Raises UserError if best.json cannot be read.
    """
    try:
        content = json.loads((directory / BEST).read_text())
        best = BestCheckpoint(
            step_folder(directory, int(content["step"])), int(content["step"]), float(content["loss"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory / BEST} cannot be read ({error!r}): remove the file to continue without a best checkpoint"
        ) from None
    return best if _is_complete(best.folder, best.step) else None


def retire(directory: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove old checkpoints and the remains of interrupted saves.

    Kept are the newest `keep_last`, the best one, and those whose step is a multiple of `keep_every` (0: no others).
    """
    best = read_best(directory)
    for folder in complete_checkpoints(directory)[:-keep_last]:
        if best is not None and folder == best.folder:
            continue
        if keep_every and int(folder.name.removeprefix("step_")) % keep_every == 0:
            continue
        # marker first: an interrupted removal must not leave a folder that looks complete
        (folder / MARKER).unlink()
        shutil.rmtree(folder)
    for torn in directory.glob("step_*.tmp"):
        shutil.rmtree(torn)


def _is_complete(folder: Path, step: int) -> bool:
    try:
        return read_info(folder).step == step and (folder / "model" / "metadata.json").is_file()
    except UserError:
        return False
