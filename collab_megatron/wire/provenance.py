"""Provenance of a checkpoint: versions, config, position in the data; and how a run differs from it. Pure: no torch.

The data order is a pure function of (seed, step) (data/row_order.py), so the position in it is a number of rows.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from collab_megatron import __version__

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "sglang")
_ABSENT = "(absent)"

# effects of changed keys on the resumed run; the effect of other keys is clear from their names
_MEANING: Mapping[str, str] = {
    "run.seed": "another data order: rows of this epoch may be used twice or never",
    "data.train": "the position in the data order stays, the rows change",
    "data.validation": "held-out losses before and after are of different conversations",
    "max_tokens": "other rows are left out, so the data order changes",
    "rollout.max_prompt_tokens": "other rows are left out, so the data order changes",
    "train.steps": "a decaying learning rate is spread over the new length",
    "algorithm.mini_batches": "a decaying learning rate is spread over the new number of optimizer steps",
    "model.path": "the policy's weights come from the checkpoint; only a reference model is loaded from model.path",
}
_SILENT = ("run.resume",)  # differs because this is a resume

# sections and keys that decide the weights of every step: if they differ, it is another run
_DECIDES = (
    *("model", "data.train", "algorithm", "optimizer", "rollout", "reward", "batch_size", "max_tokens"),
    *("dpo", "online_dpo", "replay"),
    *("run.seed", "run.init_from", "driver.max_staleness", "driver.oversample_prompts"),
)
_DECIDES_NOT = (
    "algorithm.preset",  # its pieces decide
    *("algorithm.reference", "dpo.reference"),
    *("optimizer.distributed", "optimizer.overlap", "optimizer.cpu_offload"),
)
_DECIDES_OF_LLMS = ("model", "temperature", "prompt_file", "max_tokens")
"""Of simulators and judges, and all of `extra`; addresses, time limits and retries may change."""
_CHOSEN = (".metric_weights.", ".metric_clamps.", "reward.settings.", ".extra.", "online_dpo.", "replay.")
"""Mappings with keys chosen by the user, and sections that are off by default: an absent key is a difference, not the
default of an older version."""


def package_versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that compute a step; absent packages are left out."""
    found = {"python": platform.python_version(), "collab_megatron": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def data_position(*, seed: int, steps: int, rows_per_step: int) -> dict[str, int]:
    """The position in the data order after `steps` steps; JSON."""
    return {"seed": seed, "rows_per_step": rows_per_step, "rows": steps * rows_per_step}


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], versions: Mapping[str, str], rows_per_step: int, step: int
) -> list[str]:
    """One line for every difference between a checkpoint's provenance and the run that resumes from it.

    saved: the checkpoint's `extra`. now: the run's config as JSON. versions: the checkpoint's; if empty, versions are
    not compared.
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
        lines.append(f"data: {rows} rows were used; this run continues at row {step * rows_per_step} of the data order")
    here = package_versions()
    for name in sorted(versions.keys() | here.keys()) if versions else ():
        old, new = versions.get(name, _ABSENT), here.get(name, _ABSENT)
        if old != new:
            lines.append(f"{name} (version): {old} -> {new}")
    return lines


def decisive_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The lines of `differences` that make `now` another run than the one that saved the checkpoint.

    saved, now: as in `differences`. A key that only one of the two package versions knows is no difference.
    """
    before, after = dict(_flat(saved.get("config", now))), dict(_flat(now))
    return [
        f"{key}: {before.get(key, _ABSENT)} -> {after.get(key, _ABSENT)}"
        for key in sorted(before.keys() | after.keys())
        if _decides(key)
        and before.get(key, _ABSENT) != after.get(key, _ABSENT)
        and ((key in before and key in after) or any(name in key for name in _CHOSEN))
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
