"""A stream of tensors as a Hugging Face folder: sharded safetensors, index, config, tokenizer, chat template.

Written into a hidden folder beside the target and renamed at the end, so the target either is whole or does not exist.
Run it on one process; the other ranks only drain their stream (Actor.save_hf does both).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from collab_megatron.convert.disk import fsync_folder, is_disk_full
from collab_megatron.errors import RunError, UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_COMPANIONS = (  # what a model folder holds beside weights and config, as far as it is there
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
        raise UserError(f"{size!r} is not a size such as 5GB or 200MB")
    return int(match[1]) * _UNITS[match[2]]


def check_output(output: Path) -> None:
    """Raise UserError if `output` is there and holds anything."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; remove it or name another output")


def copy_companions(source: Path, target: Path, *, dtype: str | None = None) -> None:
    """Copy config.json (with `dtype` noted where given), tokenizer, chat template and generation config."""
    config = json.loads((source / "config.json").read_text())
    if dtype is not None:
        # transformers 5 reads `dtype`, SGLang and transformers 4 `torch_dtype`
        config.update(dtype=dtype, torch_dtype=dtype)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_hf_folder(
    stream: Iterable[tuple[str, Tensor]],
    source_folder: Path,
    output: Path,
    *,
    max_shard_size: str | int = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `stream` and the companions found in `source_folder` to `output`.

    Holds at most one shard in memory. `metadata` goes into every safetensors header.
    Raises UserError if `output` holds something already, RunError if the disk is full; then nothing is left behind.
    """
    limit = parse_size(max_shard_size)
    check_output(output)
    aside = output.parent / f".{output.name}.tmp-{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        dtype = _write_shards(stream, aside, limit, {"format": "pt", **(metadata or {})})
        copy_companions(source_folder, aside, dtype=dtype)
        fsync_folder(aside)
        if output.is_dir():
            output.rmdir()  # empty, as checked above
        aside.rename(output)
        fsync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error, output.parent):
            raise RunError(f"disk full while writing the model to {output}; free space and repeat") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shards(stream: Iterable[tuple[str, Tensor]], folder: Path, limit: int, metadata: dict[str, str]) -> str:
    """Write numbered shards and the index; returns the tensors' dtype as config.json names it."""
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    pending_bytes = total_bytes = 0
    dtype = ""

    def flush() -> None:
        nonlocal pending_bytes
        save_file(pending, folder / f"shard-{len(shards)}", metadata=metadata)
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in stream:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > limit:
            flush()
        pending[name] = tensor.detach().to("cpu", copy=True)  # a stream's tensor is only valid until the next one
        pending_bytes += size
        total_bytes += size
        dtype = str(tensor.dtype).removeprefix("torch.")
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return dtype
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return dtype
