"""A model's folder: a local path, or a Hugging Face hub name fetched into the cache; and its config.json. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from collab_megatron.errors import UserError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # config, tokenizer, chat template, index
_FILES = ["*.safetensors", *_SMALL_FILES]


def resolve_model_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model. A hub name is fetched into the cache; `weights` False leaves its weights out.

    Raises UserError when `path` is neither a folder nor a hub name that can be fetched or is in the cache.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name that is too long
        raise UserError(
            f"model.path {str(path)[:80]} cannot be used ({error.strerror}): name a folder, or a hub model as "
            "owner/name"
        ) from None
    if not _HUB_NAME.fullmatch(str(path)):
        raise UserError(f"there is no model folder {path}: name a folder, or a hub model as owner/name")
    from huggingface_hub import snapshot_download  # only here: most runs name a folder
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=_FILES if weights else _SMALL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {path} is not a folder and cannot be fetched from the hub: {error}; check the name and the network"
        ) from error


def is_hub_name(path: str) -> bool:
    """Whether `path` is no folder here and could be the name of a model on the hub."""
    return not Path(path).exists() and _HUB_NAME.fullmatch(path) is not None


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The contents of config.json. Raises UserError when it is missing or is not a JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a Hugging Face model folder: it has no config.json; name another folder"
        ) from error
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply; use the original file") from None
    except (OSError, ValueError) as error:  # ValueError: no JSON, no UTF-8
        raise UserError(f"{path} cannot be read: {error}; use the original file") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object; use the original file")
    return config
