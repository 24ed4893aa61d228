"""What a run lacks whose steps are all done: found by what lies on the disk, and nothing else counts as missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from collab_megatron.config import RLConfig, SFTConfig
from collab_megatron.errors import UserError
from collab_megatron.json_lines import append_rows
from collab_megatron.wire.checkpoints import step_folder, write_best, write_marker
from collab_megatron.wire.completion import export_label, rl_missing, supervised_missing


def rl(folder: Path, **data: str) -> RLConfig:
    raw: dict[str, Any] = {
        "run": {"dir": folder, "name": "mine"},
        "model": {"path": "m"},
        "data": {"train": "t", **data},
        "simulators": {"user": {"model": "u"}, "judge": {"model": "j"}},
        "train": {"steps": 5},
    }
    return RLConfig.model_validate(raw)


def sft(folder: Path, **sections: Any) -> SFTConfig:
    raw = {
        "run": {"dir": folder, "name": "mine"},
        "model": {"path": "m"},
        "data": {"train": "t", "validation": "v"},
        "train": {"steps": 5},
        "export_hf": folder / "hf",
        "batch_size": 2,
        "max_tokens": 10,
    }
    return SFTConfig.model_validate({**raw, **sections})


def test_an_rl_run_is_done_with_its_last_evaluation_and_its_probe(tmp_path: Path) -> None:
    config = rl(tmp_path, validation="v")
    evaluation = "the held-out evaluation after step 5"
    assert rl_missing(config) == [evaluation, "the engine probe"]
    assert rl_missing(rl(tmp_path)) == ["the engine probe"]
    config.run.engine_probe_file.parent.mkdir(parents=True)
    config.run.evaluations_file.parent.mkdir(parents=True)
    for text, missing in (
        ("{", True),
        ("[5]", True),
        ('{"weight_version": "4"}', True),
        ('{"weight_version": "5"}', False),
    ):
        config.run.engine_probe_file.write_text(text)
        assert ("the engine probe" in rl_missing(config)) == missing
    append_rows(config.run.evaluations_file, [{"step": 4, "mr": 0.5}])
    with config.run.evaluations_file.open("a") as file:
        file.write('{"step": 5, "mr": 0.')
    assert rl_missing(config) == [evaluation]
    append_rows(config.run.evaluations_file, [{"step": 5, "mr": 0.5}])
    assert rl_missing(config) == []
    config.run.evaluations_file.write_text('{"step": 5}\nhalf\n')
    with pytest.raises(UserError, match=r"mine\.jsonl: line 2 is not a JSON object"):
        rl_missing(config)


def test_a_supervised_run_is_done_with_its_last_loss_and_its_export(tmp_path: Path) -> None:
    config = sft(tmp_path)
    metrics = config.run.tensorboard_dir / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    append_rows(metrics, [{"step": 4, "eval/loss": 0.5}, {"step": 5, "train/loss": 0.5}])
    export = f"the export to {tmp_path / 'hf'}"
    assert supervised_missing(config) == ["the held-out loss after step 5", export]
    append_rows(metrics, [{"step": 5, "eval/loss": 0.75}])
    assert supervised_missing(config) == [export]
    assert supervised_missing(sft(tmp_path, export_hf=None)) == []

    def exported(step: int) -> list[str]:
        (tmp_path / "hf").mkdir(exist_ok=True)
        label = export_label(config, step)
        save_file({"a": torch.zeros(1)}, tmp_path / "hf" / "model.safetensors", metadata=label)
        return supervised_missing(config)

    (tmp_path / "hf").mkdir()
    assert supervised_missing(config) == [export]
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"half")
    assert supervised_missing(config) == [export]
    assert exported(4) == [export]
    assert exported(5) == []
    best = step_folder(config.run.checkpoints_dir, 4)
    (best / "model").mkdir(parents=True)
    (best / "model" / "metadata.json").write_text(json.dumps({}))
    write_marker(best, step=4, layout={}, extra={})
    write_best(config.run.checkpoints_dir, 4, 0.5)
    assert exported(5) == [export]  # the weights of the lowest loss are exported
    assert exported(4) == []
    other = sft(tmp_path, run={"dir": tmp_path, "name": "other"}, data={"train": "t"})
    assert supervised_missing(other) == [export]
