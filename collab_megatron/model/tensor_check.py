"""Do the weights fit config.json? Answered from the headers of the safetensors files, before any process starts.

A header holds names, dtypes and shapes and is some kilobytes long; of a model on the Hugging Face hub whose weights are
not in the cache nothing else is fetched. Pure: no torch.
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
    """Every tensor of the model `path`, whose small files lie in `folder`; its weights too, or only on the hub.

    Raises UserError where there are no safetensors, or a file is missing or damaged.
    """
    return _local(folder) if Path(path).is_dir() or _is_whole(folder) else _on_hub(path)


def _is_whole(folder: Path) -> bool:
    """Whether all weights are there: a download that was interrupted leaves some."""
    index = folder / INDEX
    files = [folder / name for name in read_index(index).values()] if index.is_file() else folder.glob("*.safetensors")
    found = [file.is_file() for file in files]
    return bool(found) and all(found)


def header_metadata(file: Path) -> Mapping[str, str]:
    """What the writer of a safetensors file noted in its header; empty where it cannot be read."""
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        return parse_local_safetensors_file_metadata(file).metadata
    except (OSError, ValueError, KeyError, SafetensorsParsingError):
        return {}


def check_tensors(shapes: Shapes, spec: ModelSpec, where: str | Path) -> None:
    """Raise UserError naming a tensor that is missing, that nobody knows, or that has another shape."""
    check_tensor_names(shapes, spec, where)
    for name, wanted in _expected(spec).items():
        if shapes[name] != wanted:
            raise UserError(
                f"tensor {name} of {where} has shape {list(shapes[name])}; config.json asks for {list(wanted)}: take "
                "weights and config.json of one model"
            )


def check_tensor_names(found: Collection[str], spec: ModelSpec, where: str | Path) -> None:
    """Raise UserError naming a tensor that the model needs and `where` lacks, or the other way round."""
    expected = _expected(spec)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"tensor {name} of shape {list(shape)} is missing in {where}")
    ignored = {"lm_head.weight"} if spec.tied else set()
    unknown = {n for n in set(found) - expected.keys() - ignored if not n.endswith(_IGNORED_ENDINGS)}
    if unknown:
        raise UserError(f"{where} holds tensors that {spec.architecture} does not have: {sorted(unknown)[:3]}")


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
        raise UserError(f"{folder} has no *.safetensors; convert the model's weights to safetensors first")
    for name, tensor in stored.items():
        if tensor.dtype not in _DTYPES and not name.endswith(_IGNORED_ENDINGS):
            raise UserError(
                f"tensor {name} of {tensor.file} is of {tensor.dtype}, and weights are read of {', '.join(_DTYPES)}: "
                "convert it to one of them"
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
            f"{path} has no safetensors on the hub: choose a model that has, or convert its weights"
        ) from None
    except (HTTPError, OSError, HFValidationError, SafetensorsParsingError) as error:
        raise UserError(f"the headers of {path}'s weights cannot be fetched from the hub: {_line(error)}") from None
    return {
        name: tuple(tensor.shape)
        for header in headers.files_metadata.values()
        for name, tensor in header.tensors.items()
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
