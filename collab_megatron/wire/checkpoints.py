"""Checkpoint folders: their names, what makes one complete, which is the newest, which are kept. Pure: no torch.

checkpoints/NAME/
    step_00000040/          renamed from step_00000040.tmp once everything below is on the disk
        model/              megatron's distributed checkpoint (torch_dist)
        hf/                 config, tokenizer, chat template: what conversion needs
        complete.json       the marker, written last: step, layout, package versions, extra state
    best.json               the step whose held-out loss is the lowest, where the run measures one
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
from collab_megatron.wire.origin import package_versions

MARKER = "complete.json"
BEST = "best.json"
FORMAT = 2
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a complete checkpoint says of itself."""

    folder: Path
    step: int  # training steps done
    extra: dict[str, Any]  # the caller's own JSON: config, data position, weight version
    layout: dict[str, Any]  # state.layout_of: sizes of the grid, dtype, architecture, kind of optimizer
    versions: dict[str, str]  # of Python and the packages that wrote it

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def hf_folder(self) -> Path:
        return self.folder / "hf"


@dataclass(frozen=True)
class BestCheckpoint:
    """What best.json says, while the checkpoint that it names is there."""

    folder: Path
    step: int
    loss: float  # held-out, in nats a token


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once it is complete."""
    return directory / f"step_{step:08d}"


def write_marker(folder: Path, *, step: int, layout: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Declare `folder` complete. Raises TypeError where `extra` is not JSON."""
    content = {
        "format": FORMAT,
        "step": step,
        "layout": dict(layout),
        "versions": package_versions(),
        "extra": dict(extra),
    }
    (folder / MARKER).write_text(json.dumps(content, indent=2) + "\n")


def read_info(folder: Path) -> CheckpointInfo:
    """Read the marker. Raises UserError where `folder` is not a complete checkpoint of this format."""
    try:
        content = json.loads((folder / MARKER).read_text())
        found = content["format"]
        info = CheckpointInfo(
            folder, int(content["step"]), content["extra"], content["layout"], content.get("versions", {})
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a complete checkpoint: its {MARKER} is missing or unreadable") from error
    if found != FORMAT:
        raise UserError(
            f"{folder} is a checkpoint of format {found}; this version reads format {FORMAT}: use the "
            "version of collab_megatron that wrote it"
        )
    return info


def complete_checkpoints(directory: Path) -> list[Path]:
    """Step folders whose name and marker agree, oldest first."""
    found = []
    for folder in directory.glob("step_*") if directory.is_dir() else ():
        match = _NAME.fullmatch(folder.name)
        if match and _says(folder, int(match[1])):
            found.append(folder)
    return sorted(found)


def newest_complete(directory: Path) -> Path | None:
    """The newest complete checkpoint, never a torn one; None where there is none."""
    return next(reversed(complete_checkpoints(directory)), None)


def named_checkpoint(path: Path) -> CheckpointInfo:
    """What a user's path means: a complete step folder, or the newest in a folder of them. Raises UserError for
    neither."""
    folder = path if (path / MARKER).is_file() else newest_complete(path)
    if folder is None:
        raise UserError(f"{path} is not a complete checkpoint and holds none: name a step folder, or a folder of some")
    return read_info(folder)


def write_best(directory: Path, step: int, loss: float) -> None:
    """Name the complete checkpoint of `step` as the best; the one named before loses its protection."""
    best = {"step": step, "loss": loss, "folder": step_folder(directory, step).name}
    with atomic_write(directory / BEST) as temporary:
        temporary.write_text(json.dumps(best) + "\n")


def read_best(directory: Path) -> BestCheckpoint | None:
    """The checkpoint with the lowest held-out loss; None where none is named or it is gone.

    Raises UserError where best.json cannot be read.
    """
    try:
        content = json.loads((directory / BEST).read_text())
        best = BestCheckpoint(
            step_folder(directory, int(content["step"])), int(content["step"]), float(content["loss"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / BEST} cannot be read ({error!r}): remove it to go on without") from None
    return best if _says(best.folder, best.step) else None


def retire(directory: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove complete checkpoints and whatever an interrupted save left behind.

    Kept are the newest `keep_last`, the one that best.json names, and those whose step is a multiple of `keep_every`
    (0: no others).
    """
    best = read_best(directory)
    for folder in complete_checkpoints(directory)[:-keep_last]:
        if best is not None and folder == best.folder:
            continue
        if keep_every and int(folder.name.removeprefix("step_")) % keep_every == 0:
            continue
        # without its marker first: a removal cut short must not leave something that looks complete
        (folder / MARKER).unlink()
        shutil.rmtree(folder)
    for torn in directory.glob("step_*.tmp"):
        shutil.rmtree(torn)


def _says(folder: Path, step: int) -> bool:
    try:
        return read_info(folder).step == step and (folder / "model" / "metadata.json").is_file()
    except UserError:
        return False
