"""Where a checkpoint comes from: versions, config, place in the data; and in what a run differs. Pure: no torch.

The data order is a pure function of (seed, step) (data/order.py), so the place in it is a number of rows.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from collab_megatron import __version__

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "sglang")
_ABSENT = "(absent)"

# what a changed key does to the run that goes on; keys that are not here change what their name says
_MEANING: Mapping[str, str] = {
    "run.seed": "another data order: rows of this epoch may come twice or not at all",
    "data.train": "the place in the data order is kept, the rows are others",
    "data.validation": "held-out losses of before and after are of different conversations",
    "max_tokens": "other rows are left out, so the data order is another one",
    "rollout.max_prompt_tokens": "other rows are left out, so the data order is another one",
    "train.steps": "a decaying learning rate is spread over the new length",
    "algorithm.mini_batches": "a decaying learning rate is spread over the new number of optimizer steps",
    "model.path": "the policy's weights come from the checkpoint; only a reference model comes from there",
}
_SILENT = ("run.resume",)  # it differs because this is a resume


def package_versions() -> dict[str, str]:
    """Versions of Python, of ours and of the packages that decide what a step computes; absent ones left out."""
    found = {"python": platform.python_version(), "collab_megatron": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def data_position(*, seed: int, steps: int, rows_per_step: int) -> dict[str, int]:
    """The place in the data order after `steps` steps; JSON."""
    return {"seed": seed, "rows_per_step": rows_per_step, "rows": steps * rows_per_step}


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], versions: Mapping[str, str], rows_per_step: int, step: int
) -> list[str]:
    """One line for every difference between what a checkpoint says of its making and the run that takes it over.

    saved: the checkpoint's `extra`. now: the run's config as JSON. versions: the checkpoint's; none are compared where
    it has none.
    """
    lines = []
    before, after = dict(_flat(saved.get("config", now))), dict(_flat(now))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if old != new and key not in _SILENT:
            meaning = f" ({_MEANING[key]})" if key in _MEANING else ""
            lines.append(f"{key}: {old} -> {new}{meaning}")
    rows = saved.get("data", {}).get("rows")
    if rows is not None and rows != step * rows_per_step:
        lines.append(f"data: {rows} rows were used; this run goes on at row {step * rows_per_step} of the order")
    here = package_versions()
    for name in sorted(versions.keys() | here.keys()) if versions else ():
        old, new = versions.get(name, _ABSENT), here.get(name, _ABSENT)
        if old != new:
            lines.append(f"{name} (version): {old} -> {new}")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, value)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
