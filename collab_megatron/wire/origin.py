"""Where a checkpoint comes from: versions, config, place in the data; and in what a run differs. Pure: no torch.

The data order is a pure function of (seed, step) (data/row_order.py), so the place in it is a number of rows.
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

# what decides the weights of every step: sections and keys in which two runs may not differ and be the same run
_DECIDES = (
    *("model", "data.train", "algorithm", "optimizer", "rollout", "reward", "batch_size", "max_tokens"),
    *("run.seed", "run.init_from", "driver.max_staleness", "driver.oversample_prompts"),
)
_DECIDES_NOT = ("algorithm.reference", "optimizer.distributed", "optimizer.overlap", "optimizer.cpu_offload")
_DECIDES_OF_LLMS = ("model", "temperature", "prompt_file", "max_tokens")
"""Of the LLMs around the policy, and all of `extra`; where they are and how patiently they are asked may change."""
_NAMED_BY_THE_USER = (".metric_weights.", ".extra.")
"""Mappings in which a key that is absent says something, and not only that a version did not know it."""


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


def decisive_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines as those of `differences`, for what makes `now` another run than the one that saved a checkpoint.

    saved, now: as there. A key that one of the two versions of this package did not know makes no difference.
    """
    before, after = dict(_flat(saved.get("config", now))), dict(_flat(now))
    return [
        f"{key}: {before.get(key, _ABSENT)} -> {after.get(key, _ABSENT)}"
        for key in sorted(before.keys() | after.keys())
        if _decides(key)
        and before.get(key, _ABSENT) != after.get(key, _ABSENT)
        and ((key in before and key in after) or any(name in key for name in _NAMED_BY_THE_USER))
    ]


def _decides(key: str) -> bool:
    if key.startswith(("simulators.", "reward.judges.")):
        return ".extra." in key or key.rpartition(".")[2] in _DECIDES_OF_LLMS
    return key not in _DECIDES_NOT and any(key == name or key.startswith(f"{name}.") for name in _DECIDES)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, value)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
