"""Checks and plan of train_dpo before a process is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from collab_megatron.config import DPOConfig, load_config
from collab_megatron.data.parquet import Pair, write_pairs
from collab_megatron.errors import UserError
from collab_megatron.launch.epochs import epochs_to_steps
from collab_megatron.launch.node import parse_node
from collab_megatron.launch.plan import stages_of, supervised_plan
from collab_megatron.launch.preflight import check_supervised
from collab_megatron.model.spec import model_spec
from collab_megatron.types import Message
from tests.conftest import REPOSITORY
from tests.launch.test_plan import LLAMA

PAIR = Pair(
    "c", (Message("user", "a table"),), (Message("assistant", "which day?"),), (Message("assistant", "monday"),)
)
LONG = replace(PAIR, rejected=(Message("assistant", "monday " * 200),))


def load(folder: Path, model: Path | str, *overrides: str) -> DPOConfig:
    paths = (f"run.dir={folder}", f"model.path={model}", "max_tokens=100", "export_hf=null", "parallel.device=cpu")
    data = (f"data.train={folder / 'train.parquet'}", "data.validation=null", "train.eval_interval=0")
    return load_config(DPOConfig, REPOSITORY / "conf" / "demo_dpo.yaml", [*paths, *data, *overrides])


def test_pairs_are_read_and_counted_before_the_start(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "train.parquet", [PAIR, PAIR, PAIR, LONG])
    config = load(tmp_path, tiny_model, "train={epochs: 4, steps: null}", "batch_size=2", "optimizer.warmup_steps=1")
    config = epochs_to_steps(config)
    assert config.train.steps == 6  # 4 x 3 / 2
    assert "train.epochs=4: 3 usable pairs in steps of 2 make 6 steps" in capsys.readouterr().out
    check_supervised(config, dry_run=True)
    said = capsys.readouterr().out
    assert "left out: 1 of 4 pairs" in said
    assert "training    6 steps of 2 pairs" in said
    write_pairs(tmp_path / "train.parquet", [LONG])
    with pytest.raises(UserError, match=r"1 of 1 pairs of .*: raise max_tokens"):
        check_supervised(config)


def test_the_plan_counts_both_replies_and_the_reference(tmp_path: Path) -> None:
    spec, node = model_spec(LLAMA), parse_node("8x80")
    found = {}
    for kind in ("model", "swap"):
        config = load(tmp_path, "m", f"dpo.reference={kind}", "batch_size=8", "parallel.device=cuda")
        (stage,) = stages_of(config, spec, "cuda")
        found[kind] = stage
        lines = supervised_plan(config, spec, node=node).splitlines()
        # 8 pairs of 2 replies of 100 tokens, 81 of which fit into a micro-batch
        assert any(line.startswith("work        at most 1 micro-batch a data rank") for line in lines)
        assert "training    200 steps of 8 pairs" in lines
    assert found["model"].reference == found["model"].weights > 0 == found["swap"].reference
    assert found["swap"].host_reference == 2 * found["swap"].weights
