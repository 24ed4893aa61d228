"""Safe loading of checkpoints: no file of a checkpoint can execute code.

Upstream reads `.metadata` with pickle.load and passes byte entries to an unrestricted torch.load. Here a pickle may
name only the few classes that describe tensors, and byte entries, which are never written, are refused.
Upstream: megatron/core/dist_checkpointing/serialization.py, strategies/torch.py (0.16.1 and 0.19.2, of which only what
both have is used), torch/distributed/checkpoint.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as upstream
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    parse_strict_flag,
    validate_integrity_and_strict_load,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from collab_megatron.errors import RunError, UserError

_CLASSES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "TensorStorageMetadata",
                "ChunkStorageMetadata",
                "BytesStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)


class _Refused(pickle.UnpicklingError):
    """A pickle names something that is not on the list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Refused(f"{module}.{name}")


def read_metadata(file: Path) -> Metadata:
    """Read torch's `.metadata`. Raises UserError if it holds anything but descriptions of tensors."""
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        assert isinstance(metadata, Metadata)
        assert all(isinstance(item, TensorStorageMetadata) for item in metadata.state_dict_metadata.values())
        # only files of the checkpoint's own folder
        assert all(Path(item.relative_path).name == item.relative_path for item in metadata.storage_data.values())
    except OSError as error:
        raise RunError(f"cannot read {file}: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(_refusal(file, error)) from error
    return metadata


def read_common(file: Path) -> dict[str, Any]:
    """Read megatron's `common.pt`: plain numbers, strings, tensors. Raises UserError if it holds anything else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        assert isinstance(content, dict)
    except OSError as error:
        raise RunError(f"cannot read {file}: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(_refusal(file, error)) from error
    return content


def refusal(folder: Path, error: BaseException) -> str | None:
    """A message for the user if `error` is torch's refusal of a pickle in a tensor file; else None."""
    failures = getattr(error, "failures", {})  # of a CheckpointException: rank -> (exception, traceback)
    found = [error, *(failure[0] for failure in failures.values())]
    if any(isinstance(one, pickle.UnpicklingError) for one in found):
        return _refusal(folder, error)
    return None


def _refusal(path: Path, error: BaseException) -> str:
    named = f" (it names {error})" if isinstance(error, _Refused) else ""
    return f"{path} holds something other than tensors{named}: it is damaged or hostile; resume from another checkpoint"


def load_sharded(tree: dict[str, Any], folder: Path, metadata: Metadata, group: dist.ProcessGroup) -> dict[str, Any]:
    """Megatron's `dist_checkpointing.load` without its common part, which read_common has read.

    Megatron's own entry point differs between versions: 0.19 has no strategy for the common part, and where common.pt
    is missing unpickles the metadata. Collective. Raises torch's CheckpointException on every rank if any cannot read.
    """
    if maybe_load_config(str(folder)) is None:
        raise RunError(f"{folder} is not a checkpoint of megatron's: it has no metadata.json")
    sharded, plain, factories = load_preprocess(tree)
    loaded: dict[str, Any] = {}
    merge(loaded, plain)
    sharded, _ = extract_sharded_base(sharded)
    mine, everyones = determine_global_metadata(sharded)
    strict = parse_strict_flag(StrictHandling.ASSUME_OK_UNEXPECTED)
    sharded, _, _ = validate_integrity_and_strict_load(sharded, strict, True, mine, everyones, None)
    merge(loaded, _read_tensors(sharded, folder, metadata, group))
    return cast("dict[str, Any]", apply_factory_merges(loaded, factories))


def _read_tensors(sharded: Any, folder: Path, metadata: Metadata, group: dist.ProcessGroup) -> Any:
    """Megatron's TorchDistLoadShardedStrategy.load with safely read metadata, and without byte entries."""
    tensors = list(nested_values(sharded))
    # the vocabulary is padded for the tensor-parallel size: its tensors differ in length between layouts
    padded = {tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch}
    flat, flat_mapping, renamed = upstream._replace_state_dict_keys_with_sharded_keys(sharded)
    state = upstream.mcore_to_pyt_state_dict(flat, True)
    dcp.load(
        state,
        storage_reader=_PreparsedReader(folder, metadata),
        planner=_TensorPlanner(
            shapes_validation_sharded_tensors=[tensor for tensor in tensors if tensor.key not in padded],
            allow_shape_mismatch_sharded_tensors=padded,
        ),
        process_group=group,
    )
    unwrapped = {key: upstream._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
    return upstream._replace_sharded_keys_with_state_dict_keys(unwrapped, flat_mapping, renamed)


class _PreparsedReader(dcp.FileSystemReader):
    def __init__(self, path: str | Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:  # no **kwargs: torch checks for them
        return self._metadata


class _TensorPlanner(upstream.MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise _Refused(f"bytes for {read_item.dest_index.fqn}")
