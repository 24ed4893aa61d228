"""A model of more than 500 MB is converted without ever being in memory; an interrupted conversion leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from collab_megatron.model.spec import model_spec
from collab_megatron.trainer.convert.buckets import tensor_plan
from collab_megatron.trainer.convert.hf_folder import cut_into_shards, finish_folder, write_shard
from tests.trainer.parallel.ranks import REPO

_SHARD = 100 * 10**6
_MODEL = 500 * 10**6
_GIGABYTE = 10**9
_LIBRARIES = 450 * 10**6  # an interpreter that has imported torch and megatron


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of bf16 noise, in shards of 100 MB, made without the model ever being in memory."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    source = folder / "source"
    config.save_pretrained(source)
    noise = torch.randint(0, 2**14, (2**23,), dtype=torch.int16).view(torch.bfloat16)
    shards = cut_into_shards(tensor_plan(model_spec(config.to_dict()), torch.bfloat16), _SHARD)
    (folder / "big").mkdir()
    for number, shard in enumerate(shards):
        tensors = (noise.roll(i)[: torch.Size(t.shape).numel()].view(t.shape) for i, t in enumerate(shard))
        write_shard(folder / "big", number, shard, tensors, None)
    finish_folder(folder / "big", shards, source)
    return folder / "big"


# a process that starts another lends it its own peak, and pytest's is large: a small one stands between
_MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def peak_of(*args: str | Path | int) -> int:
    """Bytes: the largest resident set of the converter."""
    converter = [sys.executable, "-W", "ignore", str(REPO / "tools" / "convert_checkpoint.py"), *map(str, args)]
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, *converter],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    print(result.stderr)
    return int(result.stdout)


@pytest.mark.slow
def test_peak_is_a_shard_and_a_gigabyte_at_most(big: Path, tmp_path: Path) -> None:
    files = sorted(big.glob("*.safetensors"))
    size, shard = sum(f.stat().st_size for f in files), max(f.stat().st_size for f in files)
    assert size > _MODEL
    assert shard < 1.1 * _SHARD
    there = peak_of("hf-to-megatron", "--hf-path", big, "--output", tmp_path / "megatron")
    back = peak_of(
        "megatron-to-hf",
        "--checkpoint",
        tmp_path / "megatron",
        "--output",
        tmp_path / "back",
        "--max-shard-size",
        _SHARD,
    )
    print(json.dumps({"model": size, "shard": shard, "there": there, "back": back}))
    assert max(there, back) < shard + _GIGABYTE
    assert max(there, back) - _LIBRARIES < size / 2  # so the model is never in memory
    for file in files:
        with safe_open(file, framework="pt") as old, safe_open(tmp_path / "back" / file.name, framework="pt") as new:
            assert set(old.keys()) == set(new.keys())
            assert all(torch.equal(old.get_tensor(name), new.get_tensor(name)) for name in old.keys())  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param("1", marks=pytest.mark.full), "2"])
def test_ended_in_the_middle_it_leaves_nothing(big: Path, tmp_path: Path, processes: str) -> None:
    tool, output = str(REPO / "tools" / "convert_checkpoint.py"), tmp_path / "megatron"
    command = [sys.executable, "-W", "ignore", tool, "hf-to-megatron", "--hf-path", str(big), "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--processes", processes],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in output.glob("*.tmp/model/*.distcp")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not output.exists()
