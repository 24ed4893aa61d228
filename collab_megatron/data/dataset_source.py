"""Read rows from a parquet, JSON or JSONL file, a folder of them, a saved `datasets` folder, or a hub name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from collab_megatron.data.bad_rows import BadRows
from collab_megatron.data.collab_rows import CollabRow, parse_rows
from collab_megatron.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".json")
SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")
DEFAULT_SPLITS = ("train",)


def load_rows(source: str, splits: Sequence[str] = (), bad: BadRows | None = None) -> list[CollabRow]:
    """All CollabLLM rows of `source`. `splits`: of a hub name or a saved dataset, in this order; empty: train.

    Raises UserError if there are no rows, or for an unreadable row that `bad` does not skip.
    """
    bad = bad or BadRows()
    return parse_rows(load_raw(source, splits, bad), source, bad)


def load_raw(
    source: str,
    splits: Sequence[str] = (),
    bad: BadRows | None = None,
    *,
    subset: str | None = None,
    option: str = "--split",
) -> list[Mapping[str, Any]]:
    """Rows as plain mappings, unchecked. `subset`: the configuration of a hub dataset. `option`: where the user names
    splits, for messages. Raises UserError as load_rows does."""
    path, bad = Path(source), bad or BadRows()
    if path.is_file():
        if splits:
            raise UserError(f"{source} is a single file without splits: leave {option} out")
        return _read_file(path, bad)
    if path.is_dir():
        return _read_folder(path, splits, bad, option)
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix in SUFFIXES or source.count("/") != 1:
        raise UserError(f"there is no dataset {source}: name a file, a folder, or a hub dataset (owner/name)")
    return [row for split in splits or DEFAULT_SPLITS for row in _from_hub(source, split, subset)]


def _read_file(path: Path, bad: BadRows) -> list[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            rows: list[Mapping[str, Any]] = pq.read_table(path).to_pylist()
            return rows
        if path.suffix == ".jsonl":
            return list(read_json_lines(path, bad))
        if path.suffix == ".json":
            value = json.loads(path.read_text("utf-8"))
            if not isinstance(value, list):
                raise UserError(f"{path} holds a {type(value).__name__}, but must hold a list of rows")
            return value
    except UserError:
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (ValueError, OverflowError, RecursionError) as error:  # no JSON, a huge number, nested too deeply
        what = "cannot be read" if path.suffix == ".parquet" else "is not valid JSON"
        raise UserError(f"{path} {what}: {error}") from None
    raise UserError(f"{path} is not a known kind of file: its name must end in {', '.join(SUFFIXES)}")


def read_json_lines(path: Path, bad: BadRows | None = None) -> Iterable[Mapping[str, Any]]:
    """The values of a JSONL file without its empty lines.

    Raises UserError with the number (from 1) of the first line that is no JSON in UTF-8, unless `bad` skips such lines.
    """
    bad = bad or BadRows()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    bad.found(f"{path}, line {number} is not UTF-8: {error}")
                    continue
                except (ValueError, RecursionError) as error:  # no JSON, a huge number, nested too deeply
                    bad.found(f"{path}, line {number} is not valid JSON: {error}")
                    continue
                yield row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read_folder(folder: Path, splits: Sequence[str], bad: BadRows, option: str) -> list[Mapping[str, Any]]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _from_disk(folder, splits, option)
    # Only one kind of file, rows before descriptions: dataset folders have small .json files next to their rows.
    found = [
        path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    files = next((same for suffix in SUFFIXES if (same := sorted(p for p in found if p.suffix == suffix))), [])
    # Folders saved from the hub hold train-*.parquet next to test-*.parquet: mix them only on request.
    if any(path.name.startswith(SPLIT_NAMES) for path in files):
        files = [path for split in splits or DEFAULT_SPLITS for path in _files_of(split, files, folder, option)]
    elif splits and files:
        raise UserError(
            f"the files of {folder} are not named after splits ({', '.join(SPLIT_NAMES)}): leave {option} out"
        )
    if not files:
        raise UserError(f"{folder} holds no {', '.join(SUFFIXES)} file and is not a saved dataset: name another folder")
    return [row for path in files for row in _read_file(path, bad)]


def _files_of(split: str, files: Sequence[Path], folder: Path, option: str) -> list[Path]:
    own = [path for path in files if path.name.startswith(split)]
    if not own:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder} has no file of split {split!r}, but {names}: choose another {option}")
    return own


def _from_disk(folder: Path, splits: Sequence[str], option: str) -> list[Mapping[str, Any]]:
    import datasets  # only here: it takes a second, and files do not need it

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{folder} cannot be read as a saved dataset: {error}") from None
    if not isinstance(loaded, datasets.DatasetDict):
        if splits:
            raise UserError(f"{folder} is a saved dataset without splits: leave {option} out")
        rows: list[Mapping[str, Any]] = loaded.to_list()
        return rows
    for split in splits or DEFAULT_SPLITS:
        if split not in loaded:
            raise UserError(f"{folder} has no split {split!r}, but {', '.join(loaded)}: choose with {option}")
    return [row for split in splits or DEFAULT_SPLITS for row in loaded[split].to_list()]


def _from_hub(name: str, split: str, subset: str | None) -> list[Mapping[str, Any]]:
    import datasets

    try:
        rows: list[Mapping[str, Any]] = datasets.load_dataset(name, subset, split=split).to_list()
    except Exception as error:  # noqa: BLE001 - the hub client raises many types, all for the user to fix
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} (split {split!r}) cannot be loaded from the hub: {first_line}; check the name and the network"
        ) from None
    return rows
