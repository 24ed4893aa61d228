"""Does this model fit this layout? Answered from config.json alone, before any process starts. Pure: no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collab_megatron.config.sections import ParallelSection
from collab_megatron.convert.spec import ARCHITECTURES, model_spec
from collab_megatron.errors import UserError

SUPPORTED: tuple[str, ...] = tuple(ARCHITECTURES)


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The contents of config.json. Raises UserError when it is missing or is not a JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a Hugging Face model folder: it has no config.json") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config


def check_layout(hf_config: Mapping[str, Any], parallel: ParallelSection) -> None:
    """Raise UserError, naming what to change, where the model cannot be split as `parallel` asks."""
    spec = model_spec(hf_config)
    if parallel.tensor == 1:
        return
    for what, count in (
        ("attention heads", spec.heads),
        ("key/value heads", spec.kv_heads),
        ("MLP columns", spec.ffn),
    ):
        if count % parallel.tensor:
            sizes = (spec.heads, spec.kv_heads, spec.ffn)
            fitting = [n for n in range(1, spec.kv_heads + 1) if not any(size % n for size in sizes)]
            raise UserError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {count} {what}; "
                f"it may be {', '.join(map(str, fitting))}"
            )
