"""Check that the weights match config.json, from the headers of the safetensors files, before any process starts.

A header holds names, dtypes and shapes and takes a few kilobytes. For a model on the Hugging Face hub whose weights are
not in the cache, only the headers are fetched. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from collab_megatron.errors import UserError
from collab_megatron.model.safetensors_headers import INDEX, read_headers, read_index
from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import rows

_DTYPES = ("F32", "BF16", "F16", "F64")
_IGNORED_ENDINGS = ("rotary_emb.inv_freq",)

Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(path: str, folder: Path) -> Shapes:
    """Name -> shape of all tensors of the model `path`; `folder` has its small files, and its weights unless on hub.

    Raises UserError without safetensors files, or if one is missing or damaged.
    """
    return _local(folder) if Path(path).is_dir() or _is_whole(folder) else _on_hub(path)


def _is_whole(folder: Path) -> bool:
    """Whether all weight files are there: an interrupted download leaves only some."""
    index = folder / INDEX
    files = [folder / name for name in read_index(index).values()] if index.is_file() else folder.glob("*.safetensors")
    found = [file.is_file() for file in files]
    return bool(found) and all(found)


def header_metadata(file: Path) -> Mapping[str, str]:
    """The metadata in the header of a safetensors file; empty if it cannot be read."""
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        return parse_local_safetensors_file_metadata(file).metadata
    except (OSError, ValueError, KeyError, SafetensorsParsingError):
        return {}


def check_tensors(shapes: Shapes, spec: ModelSpec, where: str | Path) -> None:
    """Raise UserError with the name of a tensor that is missing, unknown, or has the wrong shape."""
    check_tensor_names(shapes, spec, where)
    for name, wanted in _expected(spec).items():
        if shapes[name] != wanted:
            raise UserError(
                f"tensor {name} of {where} has shape {list(shapes[name])}, but config.json asks for {list(wanted)}: "
                "use the weights and config.json of one model"
            )


def check_tensor_names(found: Collection[str], spec: ModelSpec, where: str | Path) -> None:
    """Raise UserError with the name of a tensor that `where` lacks, or that the architecture does not have."""
    expected = _expected(spec)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(
                f"tensor {name} of shape {list(shape)} is missing in {where}: use the weights and config.json of one "
                "model"
            )
    ignored = {"lm_head.weight"} if spec.tied else set()
    unknown = {n for n in set(found) - expected.keys() - ignored if not n.endswith(_IGNORED_ENDINGS)}
    if unknown:
        raise UserError(
            f"{where} holds tensors that {spec.architecture} does not have, such as {', '.join(sorted(unknown)[:3])}: "
            "use a model without them"
        )


def _expected(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    dims = spec.dims
    return {
        name: tuple(dims[dim] for dim in shape)
        for row in rows(spec)
        for name, shape in zip(row.hf, row.shapes, strict=True)
    }


def _local(folder: Path) -> Shapes:
    stored = read_headers(folder)
    if not stored:
        raise UserError(f"{folder} has no *.safetensors files: convert the model's weights to safetensors")
    for name, tensor in stored.items():
        if tensor.dtype not in _DTYPES and not name.endswith(_IGNORED_ENDINGS):
            raise UserError(
                f"tensor {name} of {tensor.file} has dtype {tensor.dtype}; supported are {', '.join(_DTYPES)}: "
                "convert the weights to one of them"
            )
    return {name: tensor.shape for name, tensor in stored.items()}


def _on_hub(path: str) -> Shapes:
    from httpx import HTTPError  # what huggingface_hub 1 lets through
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        headers = get_safetensors_metadata(path)
    except NotASafetensorsRepoError:
        raise UserError(
            f"{path} has no safetensors files on the hub: choose a model that has them, or convert its weights"
        ) from None
    except (HTTPError, OSError, HFValidationError, SafetensorsParsingError) as error:
        raise UserError(
            f"the weight headers of {path} cannot be fetched from the hub: {_line(error)}; check the name and the "
            "network"
        ) from None
    return {
        name: tuple(tensor.shape)
        for header in headers.files_metadata.values()
        for name, tensor in header.tensors.items()
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
