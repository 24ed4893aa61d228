"""Load Hugging Face safetensors into a built Megatron model, lazily: each rank reads only its own slices.

safetensors maps the file into memory; a slice reads only its own bytes. A tensor that is missing, has the wrong shape
or has no table row raises UserError: a model without one of its biases would train, but be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from collab_megatron.errors import UserError
from collab_megatron.model.safetensors_headers import INDEX, read_index
from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import ParameterRow
from collab_megatron.model.tensor_check import check_tensor_names
from collab_megatron.trainer.convert.finite import require_finite
from collab_megatron.trainer.convert.placement import local_parameters, local_rows
from collab_megatron.trainer.convert.reshape import join

if TYPE_CHECKING:
    from collab_megatron.trainer.actor.grid import RankGrid


class SafetensorsFolder:
    """The tensors of a model folder by name. Files are opened on first use and closed with the folder."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder has no readable safetensors."""
        self.folder = folder
        self._files: dict[Path, safe_open] = {}
        self._where: dict[str, Path] = {}
        index = folder / INDEX
        if index.is_file():
            self._where = {name: folder / file for name, file in read_index(index).items()}
        else:
            for path in sorted(folder.glob("*.safetensors")):
                self._where.update(dict.fromkeys(self._open(path).keys(), path))
        if not self._where:
            raise UserError(f"{folder} has no *.safetensors files: convert the model's weights to safetensors")

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str, shape: tuple[int, ...], cut: int | None, start: int, stop: int) -> Tensor:
        """Elements start..stop along dimension `cut` (None: all) of tensor `name`, which must have `shape`."""
        if name not in self._where:
            raise UserError(
                f"tensor {name} of shape {list(shape)} is missing in {self.folder}: download the model again"
            )
        path = self._where[name]
        try:
            view = self._open(path).get_slice(name)
            found = tuple(view.get_shape())
            if found != shape:
                raise UserError(
                    f"tensor {name} in {path} has shape {list(found)}, but config.json asks for {list(shape)}: use the "
                    "weights and config.json of one model"
                )
            part: Tensor = view[:] if cut is None else view[start:stop] if cut == 0 else view[:, start:stop]
        except SafetensorError as error:
            raise UserError(f"tensor {name} cannot be read from {path}: {error}; download it again") from error
        require_finite(name, path, part)
        return part

    def _open(self, path: Path) -> safe_open:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read as a safetensors file: {error}; download it again") from error
        return self._files[path]


@torch.no_grad()
def load_hf_weights(chunks: Sequence[nn.Module], spec: ModelSpec, folder: Path, grid: RankGrid) -> None:
    """Fill all parameters of this rank's model chunks (any dtype and device) from the folder's safetensors.

    No communication. Raises UserError, with tensor, shape and file, if the folder does not match config.json or has a
    NaN or infinite value. Only the ranks that read a tensor notice its wrong shape or value.
    """
    parameters = local_parameters(chunks, spec, grid)
    with SafetensorsFolder(folder) as source:
        check_tensor_names(source.names, spec, source.folder)
        for row in local_rows(spec, grid):
            parameter = parameters.pop(row.megatron)
            value = read_shard(source, row, spec, grid.tp_rank, grid.tp_size)
            assert value.shape == parameter.shape, (row.megatron, value.shape, parameter.shape)
            parameter.copy_(value)
    assert not parameters, f"parameters that were not filled: {sorted(parameters)[:5]}"


def read_shard(source: SafetensorsFolder, row: ParameterRow, spec: ModelSpec, tp_rank: int, tp_size: int) -> Tensor:
    """One rank's value of the row's Megatron parameter, in the file's dtype. Vocabulary padding is zero."""
    parts = []
    for name, dims in zip(row.hf, row.shapes, strict=True):
        shape = tuple(spec.dims[dim] for dim in dims)
        if row.cut is None:
            parts.append(source.read(name, shape, None, 0, 0))
            continue
        whole = spec.padded_vocab(tp_size) if row.is_vocab else shape[row.cut]
        start, stop = whole * tp_rank // tp_size, whole * (tp_rank + 1) // tp_size
        end = shape[row.cut]
        part = source.read(name, shape, row.cut, min(start, end), min(stop, end))
        if row.is_vocab and part.shape[0] < stop - start:
            padding = part.new_zeros(stop - start - part.shape[0], *part.shape[1:])
            part = torch.cat([part, padding])
        parts.append(part)
    return join(row, parts, spec, tp_size)
