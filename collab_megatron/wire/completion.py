"""Unfinished outputs of a run whose steps are all done: an attempt ended after the last checkpoint, before the rest.

The launcher checks this before it starts processes. The ranks of the resumed run make the missing outputs without
training.
"""

from __future__ import annotations

import json
from pathlib import Path

from collab_megatron.config import RLConfig, SupervisedConfig
from collab_megatron.json_lines import read_rows
from collab_megatron.model.tensor_check import header_metadata
from collab_megatron.wire.checkpoints import read_best

METRICS_FILE = "metrics.jsonl"


def rl_missing(config: RLConfig) -> list[str]:
    """Missing outputs after the last step, in the user's words; empty if the run is done.

    Raises UserError for a damaged JSONL file.
    """
    run, steps = config.run, config.train.steps
    missing = []
    if config.evaluates and not is_evaluated(run.evaluations_file, steps):
        missing.append(f"the held-out evaluation after step {steps}")
    if config.replay is None and not is_probed(run.engine_probe_file, steps):
        missing.append("the engine probe")
    return missing


def supervised_missing(config: SupervisedConfig) -> list[str]:
    """As `rl_missing`."""
    run, steps = config.run, config.train.steps
    missing = []
    if config.data.validation is not None and not is_measured(run.tensorboard_dir / METRICS_FILE, steps):
        missing.append(f"the held-out loss after step {steps}")
    if config.export_hf is not None and not is_exported(config):
        missing.append(f"the export to {config.export_hf}")
    return missing


def is_evaluated(evaluations: Path, step: int) -> bool:
    """Whether a run's evaluations have the figures of the weights after `step` steps."""
    return any(row["step"] == step for row in read_rows(evaluations, numbers=("step",)).rows)


def is_probed(probe: Path, step: int) -> bool:
    """Whether the engine probe is of the weights after `step` steps."""
    try:
        found = json.loads(probe.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("weight_version") == str(step)


def is_measured(metrics: Path, step: int) -> bool:
    """Whether the held-out loss after `step` steps was measured. Of a loss that is not finite only the
    token count is written."""
    rows = read_rows(metrics, numbers=("step",)).rows
    return any(row["step"] == step and ("eval/tokens" in row or "eval/loss" in row) for row in rows)


def exported_step(config: SupervisedConfig) -> int:
    """The step whose weights the run exports: the last, or the one with the lowest held-out loss (export_weights)."""
    best = None
    if config.data.validation is not None and config.train.keep_best and config.export_weights == "best":
        best = read_best(config.run.checkpoints_dir)
    return config.train.steps if best is None else best.step


def is_exported(config: SupervisedConfig) -> bool:
    """Whether export_hf has the weights of the finished run. An export folder is published whole."""
    folder = config.export_hf
    if folder is None or not folder.is_dir():
        return False
    label = export_label(config, exported_step(config))
    return any(label.items() <= header_metadata(file).items() for file in sorted(folder.glob("*.safetensors"))[:1])


def export_label(config: SupervisedConfig, step: int) -> dict[str, str]:
    """The label in the header of every exported file."""
    return {"run": str(config.run.dir), "name": config.run.name, "step": str(step)}
