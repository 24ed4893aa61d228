"""Headers of safetensors files, checked against the file sizes: finds a truncated file before a process starts.

A file is a length, a JSON header, then the tensors' bytes end to end. Pure: no torch, reads headers only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.errors import UserError

INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # what safetensors itself accepts
# bytes of an element; for other dtypes (sub-byte, newer ones) only the position in the file is checked
ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


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
    """The tensors of `file`. Raises UserError when it cannot be read, is not a safetensors file, or is truncated."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if not 0 < length <= min(size, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        found = {
            name: _stored(name, file, entry, first_byte=LENGTH_BYTES + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as a safetensors file: {reason}; download it again") from error
    for tensor in found.values():
        if tensor.start + tensor.num_bytes > size:
            raise UserError(
                f"tensor {tensor.name} goes beyond the end of {file}: the file is truncated; download it again"
            )
        needed = ELEMENT_BYTES.get(tensor.dtype, 0) * math.prod(tensor.shape)
        if needed and needed != tensor.num_bytes:
            raise UserError(
                f"tensor {tensor.name} of {file} has {tensor.num_bytes:,} bytes, but its shape {list(tensor.shape)} of "
                f"{tensor.dtype} needs {needed:,}: the file is damaged; download it again"
            )
    return found


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name; empty without safetensors files.

    Raises UserError where a file is damaged or does not match the index.
    """
    index = folder / INDEX
    if not index.is_file():
        return {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in read_header(file).items()
        }
    weight_map = read_index(index)
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(
                f"tensor {name} is missing in {folder / file}, although {index.name} lists it: download both again"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, all in the index's folder. Raises UserError."""
    try:
        content: Any = json.loads(index.read_text("utf-8"))
        weight_map = content["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("its weight_map is not a mapping of tensors to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{index} cannot be read as an index with a weight_map: {reason}; download it again") from None
    for file in weight_map.values():
        if not file or Path(file).name != file:
            raise UserError(f"{index} names the file {file!r}, which is outside its folder: download it again")
    return weight_map


def _stored(name: str, file: Path, entry: Mapping[str, Any], *, first_byte: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in (*shape, start)):
        raise ValueError(f"tensor {name} has the shape {shape!r}")
    if not isinstance(end, int) or end < start:
        raise ValueError(f"tensor {name} ends before it begins")
    return StoredTensor(name, file, str(entry["dtype"]), tuple(shape), first_byte + start, end - start)
