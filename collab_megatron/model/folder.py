"""Where a model's files are: a folder, or a name on the Hugging Face hub fetched into its cache. Pure: no torch."""

from __future__ import annotations

import re
from pathlib import Path

from collab_megatron.errors import UserError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # config, tokenizer, chat template, index
_FILES = ["*.safetensors", *_SMALL_FILES]


def resolve_model_folder(path: str | Path, *, weights: bool = True) -> Path:
    """A local folder with the model's files; of a hub name without its weights where `weights` is false.

    Raises UserError when `path` is neither a folder nor a hub name that can be fetched (or is in the cache already).
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name that is too long
        raise UserError(f"model.path {str(path)[:80]} cannot be used: {error.strerror}") from None
    if not _HUB_NAME.fullmatch(str(path)):
        raise UserError(f"there is no model folder {path}: name a folder, or a model of the hub as owner/name")
    from huggingface_hub import snapshot_download  # only here: most runs name a folder
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=_FILES if weights else _SMALL_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model {path} is neither a folder nor can it be fetched from the hub: {error}") from error
