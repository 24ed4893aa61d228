"""What a run lacks whose steps are all done: an attempt that ended after the last checkpoint left it out.

The launcher asks before it starts anything; the ranks of a resumed run make what is missing, and train nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from collab_megatron.config import RLConfig, SFTConfig
from collab_megatron.json_lines import read_rows
from collab_megatron.model.tensor_check import header_metadata
from collab_megatron.wire.checkpoints import read_best

METRICS_FILE = "metrics.jsonl"


def rl_missing(config: RLConfig) -> list[str]:
    """What is missing after the last step, in the user's words; empty where the run is done.

    Raises UserError for a damaged record.
    """
    run, steps = config.run, config.train.steps
    missing = []
    if config.data.validation is not None and not is_evaluated(run.evaluations_file, steps):
        missing.append(f"the held-out evaluation after step {steps}")
    if not is_probed(run.engine_probe_file, steps):
        missing.append("the engine probe")
    return missing


def sft_missing(config: SFTConfig) -> list[str]:
    """As `rl_missing`."""
    run, steps = config.run, config.train.steps
    missing = []
    if config.data.validation is not None and not is_measured(run.tensorboard_dir / METRICS_FILE, steps):
        missing.append(f"the held-out loss after step {steps}")
    if config.export_hf is not None and not is_exported(config):
        missing.append(f"the export to {config.export_hf}")
    return missing


def is_evaluated(evaluations: Path, step: int) -> bool:
    """Whether a run's evaluations hold the figures of the weights after `step` steps."""
    return any(row["step"] == step for row in read_rows(evaluations, numbers=("step",)).rows)


def is_probed(probe: Path, step: int) -> bool:
    """Whether the probe of the engines is that of the weights after `step` steps."""
    try:
        found = json.loads(probe.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("weight_version") == str(step)


def is_measured(metrics: Path, step: int) -> bool:
    """Whether the held-out loss after `step` steps was measured. One that is no finite number has no line."""
    rows = read_rows(metrics, numbers=("step",)).rows
    return any(row["step"] == step and ("eval/tokens" in row or "eval/loss" in row) for row in rows)


def exported_step(config: SFTConfig) -> int:
    """The step whose weights the run exports: the last, or that of the lowest held-out loss (export_weights)."""
    best = None
    if config.data.validation is not None and config.train.keep_best and config.export_weights == "best":
        best = read_best(config.run.checkpoints_dir)
    return config.train.steps if best is None else best.step


def is_exported(config: SFTConfig) -> bool:
    """Whether export_hf holds the weights that the finished run exports: a folder is whole or not there."""
    folder = config.export_hf
    if folder is None or not folder.is_dir():
        return False
    label = export_label(config, exported_step(config))
    return any(label.items() <= header_metadata(file).items() for file in sorted(folder.glob("*.safetensors"))[:1])


def export_label(config: SFTConfig, step: int) -> dict[str, str]:
    """The label of an export, in the header of every file."""
    return {"run": str(config.run.dir), "name": config.run.name, "step": str(step)}
