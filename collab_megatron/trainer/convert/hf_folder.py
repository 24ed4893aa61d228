"""Write a stream of tensors as a Hugging Face folder: sharded safetensors, index, config, tokenizer, chat template.

The folder is written under a hidden name next to the target and renamed at the end, so the target is complete or does
not exist. Run it on one process; the other ranks only drain their stream (Actor.save_hf does both).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from collab_megatron.errors import RunError, UserError
from collab_megatron.files import fsync_folder
from collab_megatron.model.safetensors_headers import INDEX
from collab_megatron.trainer.convert.buckets import TensorInfo
from collab_megatron.trainer.convert.disk_space import is_disk_full
from collab_megatron.trainer.convert.safetensors_io import write_file

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_COMPANIONS = (  # files of a model folder besides weights and config; copied if they exist
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "200MB" or a plain number. Raises UserError."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?B?)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise UserError(f"{size!r} is not a size: use a number with KB, MB or GB, such as 5GB")
    return int(match[1]) * _UNITS[match[2]]


def check_output(output: Path) -> None:
    """Raise UserError if `output` exists and is not empty, or is below a file."""
    nearest = next(place for place in output.absolute().parents if place.exists())
    if not nearest.is_dir():
        raise UserError(f"{output} cannot be created, because {nearest} is a file: name another output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; remove it or name another output")


def copy_companions(source: Path, target: Path, *, dtype: str | None = None) -> None:
    """Copy config.json (with `dtype` if given), tokenizer, chat template and generation config."""
    config = json.loads((source / "config.json").read_text())
    if dtype is not None:
        # transformers 5 reads `dtype`, SGLang and transformers 4 `torch_dtype`
        config.update(dtype=dtype, torch_dtype=dtype)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A hidden folder next to `output` to write into. It becomes `output` at the end, or is removed on an error.

    Raises UserError if `output` is not empty, RunError if the disk is full.
    """
    check_output(output)
    aside = output.parent / f".{output.name}.tmp-{os.getpid()}"
    try:
        for left in output.parent.glob(f".{output.name}.tmp-*"):
            if not _runs(left.name.rpartition("-")[2]):  # left by a process that was killed while writing
                shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        fsync_folder(aside)
        if output.is_dir():
            output.rmdir()  # empty, as checked above
        aside.rename(output)
        fsync_folder(output.parent)
    except Exception as error:
        if is_disk_full(error, output.parent):
            raise RunError(f"disk full while writing the model to {output}: free space and repeat") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def write_hf_folder(
    stream: Iterable[tuple[str, Tensor]],
    source_folder: Path,
    output: Path,
    *,
    max_shard_size: str | int = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `stream` and the other files of `source_folder` to `output`.

    Holds at most one shard in memory. `metadata` goes into each safetensors header.
    Raises UserError if `output` is not empty, RunError if the disk is full. After an error nothing is left behind.
    """
    limit = parse_size(max_shard_size)
    pending: list[Tensor] = []
    plan: list[TensorInfo] = []
    shards: list[list[TensorInfo]] = []
    size = 0
    with atomic_folder(output) as aside:

        def flush() -> None:
            write_shard(aside, len(shards), plan, pending, metadata)
            shards.append(list(plan))
            plan.clear()
            pending.clear()

        for name, tensor in stream:
            info = TensorInfo(name, tuple(tensor.shape), tensor.dtype)
            if plan and size + info.num_bytes > limit:
                flush()
                size = 0
            plan.append(info)
            size += info.num_bytes
            pending.append(tensor.detach().to("cpu", copy=True))  # a stream's tensor is only valid until the next one
        flush()
        finish_folder(aside, shards, source_folder)


def cut_into_shards(plan: Iterable[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """The tensors of each file, in order: at most `limit` bytes, or one larger tensor."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in plan:
        if shards[-1] and size + info.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def write_shard(
    folder: Path, number: int, plan: Sequence[TensorInfo], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None
) -> None:
    """Write file `number` (from 0) of a folder for finish_folder; holds one tensor at a time. Raises OSError."""
    write_file(folder / f"shard-{number}", plan, tensors, {"format": "pt", **(metadata or {})})


def finish_folder(folder: Path, shards: Sequence[Sequence[TensorInfo]], source_folder: Path) -> None:
    """Rename the shards and add index, config (with the tensors' dtype), tokenizer and the other files."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"shard-{i}").rename(folder / file)
            weight_map |= {info.name: file for info in shard}
        index = {"metadata": {"total_size": sum(map(_size, shards))}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    copy_companions(source_folder, folder, dtype=str(shards[-1][-1].dtype).removeprefix("torch."))


def _size(plan: Iterable[TensorInfo]) -> int:
    return sum(info.num_bytes for info in plan)
