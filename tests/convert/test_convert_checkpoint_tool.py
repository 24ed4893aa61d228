"""tools/convert_checkpoint.py as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.ranks import REPO
from tests.parallel.tiny import make_model


def convert(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(REPO / "tools" / "convert_checkpoint.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPO, env=_env())


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(REPO)}


@pytest.mark.slow
def test_there_and_back_is_exact(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    there = convert("hf-to-megatron", "--hf-path", source, "--output", tmp_path / "megatron")
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == str(tmp_path / "megatron" / "step_00000000")
    back = convert("megatron-to-hf", "--checkpoint", tmp_path / "megatron", "--output", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_mistakes_cost_two_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "step_00000003").mkdir()
    for args, message in (
        (("megatron-to-hf", "--checkpoint", tmp_path, "--output", tmp_path / "x"), "holds none"),
        (("hf-to-megatron", "--hf-path", tmp_path, "--output", tmp_path / "x"), "config.json"),
    ):
        result = convert(*args)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
