"""Converts a run's checkpoint to a Hugging Face folder, once; later calls use that folder.

    RUN_DIR/converted/NAME-step_00000040-1a2b3c4d/          an ordinary Hugging Face folder

The conversion needs megatron and runs in its own process. The folder appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from collab_megatron.errors import UserError
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.wire.checkpoints import MARKER, complete_checkpoints, newest_complete

_GRID = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def checkpoint_of(path: str) -> Path | None:
    """The complete checkpoint at `path`: a step folder, or the newest step in a folder of steps; None for a model
    folder or hub name. Raises UserError if no step is complete."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    if (folder / MARKER).is_file() or folder.name.startswith("step_"):
        if folder in complete_checkpoints(folder.parent):
            return folder
        raise UserError(f"{folder} is not a complete checkpoint: name another step, or the folder of all steps")
    newest = newest_complete(folder)
    if newest is None and any(folder.glob("step_*")):
        raise UserError(f"{folder} has no complete checkpoint: name a run that saved one")
    return newest


def hf_folder_of(checkpoint: Path, directory: Path, logs_dir: Path) -> Path:
    """The checkpoint as a Hugging Face folder in `directory`, converted if it does not exist yet.

    Exits with code 2 for a checkpoint that cannot be converted; raises RunError if reading or writing fails. The
    conversion prints the reason and leaves nothing behind.
    """
    folder = directory / f"{checkpoint.parent.name}-{checkpoint.name}-{_digest(checkpoint)}"
    if folder.is_dir():
        print(f"using the earlier conversion of {checkpoint}: {folder}", flush=True)
        return folder
    print(f"converting {checkpoint} to {folder}", flush=True)
    command = [sys.executable, "-m", "collab_megatron.trainer.checkpoint.to_hf", str(checkpoint), str(folder)]
    with Supervisor(logs_dir) as supervisor:
        child = supervisor.start("convert", command, {"CUDA_VISIBLE_DEVICES": ""}, show=True, unset=_GRID)
        supervisor.wait_for([child])
    return folder


def _digest(checkpoint: Path) -> str:
    """Distinguishes checkpoints with the same name: a run that starts over writes the same steps again."""
    digest = hashlib.blake2b((checkpoint / MARKER).read_bytes(), digest_size=4)
    for file in sorted(file for file in (checkpoint / "model").rglob("*") if file.is_file()):
        status = file.stat()
        digest.update(f"{file.name}|{status.st_size}|{status.st_mtime_ns}|".encode())
    return digest.hexdigest()
