"""Read and write safetensors files one tensor at a time, without mapping the file.

safetensors' own reader maps the whole file, and its writer needs all tensors of a file at once; both count as memory of
the process. The format is a length, a JSON header, then the tensors' bytes end to end.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from collab_megatron.model.safetensors_headers import LENGTH_BYTES, StoredTensor
from collab_megatron.trainer.convert.buckets import TensorInfo

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


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


def _write_header(stream: BinaryIO, plan: Sequence[TensorInfo], metadata: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for info in plan:
        start, end = end, end + info.num_bytes
        header[info.name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, valid while the tensor lives. Without numpy, which has no bfloat16 and
    leaves a storage that cannot be resized."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
