"""Safetensors files by plain reads and writes, a tensor at a time: memory holds what is asked for, never a mapped file.

safetensors' own reader maps the whole file, and its writer wants a whole file's tensors at once; both count as memory
of the process. The format is a length, a JSON header, then the tensors' bytes one after the other.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from collab_megatron.convert.buckets import TensorInfo
from collab_megatron.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # what safetensors itself accepts
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, as its header describes it."""

    name: str
    file: Path
    dtype: str  # F32, BF16 ...
    shape: tuple[int, ...]
    start: int  # first byte in the file
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What `file` holds. Raises UserError when it cannot be read, is no safetensors file, or was cut short."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(size, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        found = {
            name: _stored(name, file, entry, first_byte=_LENGTH_BYTES + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is missing or not a safetensors file: {error}") from error
    for tensor in found.values():
        if tensor.start + tensor.num_bytes > size:
            raise UserError(
                f"tensor {tensor.name} goes beyond the end of {file}: the file was cut short; fetch it again"
            )
    return found


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder, by name. Raises UserError where a file is damaged or differs from the index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in read_header(file).items()
        }
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(f"tensor {name} is missing in {folder / file}, where {index.name} has it")
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_into(stored: StoredTensor, target: Tensor) -> None:
    """Fill `target` (contiguous, on the CPU, of the stored shape and dtype) from the file. Raises OSError."""
    assert DTYPES[stored.dtype] == target.dtype, (stored, target.dtype)
    assert stored.shape == tuple(target.shape), (stored, target.shape)
    buffer = _bytes_of(target)
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        done = 0
        while done < len(buffer):  # one call reads 2 GB at most
            count = stream.readinto(buffer[done:])
            if not count:
                raise OSError(f"{stored.file} ended in the middle of {stored.name}")
            done += count


def write_file(
    file: Path, plan: Sequence[TensorInfo], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors of `plan`, taken from `tensors` one at a time in that order. Raises OSError.

    A tensor may live on any device; it must have the planned shape and dtype.
    """
    with file.open("wb") as stream:
        _write_header(stream, plan, dict(metadata or {}))
        for info, tensor in zip(plan, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), (info, tensor.shape, tensor.dtype)
            here = tensor.detach().cpu().contiguous()
            stream.write(_bytes_of(here))


def _stored(name: str, file: Path, entry: Mapping[str, list[int]], *, first_byte: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(name, file, str(entry["dtype"]), tuple(entry["shape"]), first_byte + start, end - start)


def _write_header(stream: BinaryIO, plan: Sequence[TensorInfo], metadata: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for info in plan:
        start, end = end, end + info.num_bytes
        header[info.name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, valid while the tensor lives. Not through numpy, which has no bfloat16 and
    leaves behind a storage that cannot be emptied."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
