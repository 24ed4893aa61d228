"""Tiny Hugging Face models and data that every test of actor, convert and checkpoint shares. No downloads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from collab_megatron.batching.micro_batch import TokenSample

_SIZES = {
    "vocab_size": 250,  # not a multiple of 64: padding columns must not count
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def config_of(kind: str) -> PretrainedConfig:
    if kind == "llama":
        return LlamaConfig(**_SIZES, tie_word_embeddings=True)
    if kind == "llama3":
        return LlamaConfig(**_SIZES, tie_word_embeddings=False, rope_parameters=_LLAMA3)
    if kind == "mistral":
        return MistralConfig(**_SIZES, sliding_window=8, tie_word_embeddings=False)
    if kind == "qwen2":
        return Qwen2Config(**_SIZES, tie_word_embeddings=False)
    if kind == "qwen3":
        return Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True)
    raise ValueError(kind)


KINDS = ("llama", "llama3", "mistral", "qwen2", "qwen3")


def make_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a random model (weights wide enough for peaked distributions) and stand-ins for the tokenizer's files."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"stands": "for a tokenizer"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make_samples(count: int, seed: int = 0, *, longest: int = 24) -> list[TokenSample]:
    """Ragged samples with all that the GRPO loss reads."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        length = rng.randint(6, longest)
        prompt = rng.randint(1, length - 2)
        tokens = [rng.randrange(250) for _ in range(length)]
        samples.append(
            TokenSample(
                ids=tokens,
                mask=[0.0] * prompt + [1.0] * (length - prompt),
                values={
                    "advantages": [rng.uniform(-1, 1)] * length,
                    "old_logprobs": [rng.uniform(-7, -4) for _ in tokens],
                    "rollout_logprobs": [rng.uniform(-7, -4) for _ in tokens],
                    "ref_logprobs": [rng.uniform(-7, -4) for _ in tokens],
                },
            )
        )
    return samples
