"""FLOPs against torch's own counter on real models, and the arithmetic of attention and balancing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from collab_megatron.model.flops import (
    attention_pairs,
    forward_flops,
    matmul_parameters,
    peak_flops,
    sample_cost,
    train_flops,
)
from collab_megatron.model.spec import ModelSpec, model_spec

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}


def spec_of(config: LlamaConfig) -> ModelSpec:
    return model_spec({**config.to_dict(), "architectures": [config.architectures[0]]})


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen3", True)])
def test_matches_torchs_count_of_a_real_model(kind: str, tied: bool) -> None:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
        "tie_word_embeddings": tied,
    }
    if kind == "llama":
        config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    else:
        config = Qwen3Config(**sizes, head_dim=32, architectures=["Qwen3ForCausalLM"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    spec, batch, length = spec_of(config), 2, 16
    ids = torch.zeros(batch, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids).logits.sum()
        forward = counter.get_total_flops()
        loss.backward()
    # torch multiplies the whole square of scores where we count the causal half, and the rotary table is a product too
    per_pair = 4 * spec.layers * spec.heads * spec.head_dim
    hidden_half = per_pair * batch * (length**2 - attention_pairs(length, None))
    table = 2 * (spec.head_dim // 2) * length
    assert forward == pytest.approx(forward_flops(spec, [length] * batch) + hidden_half, abs=batch * table)
    total = counter.get_total_flops()
    assert total == pytest.approx(train_flops(spec, [length] * batch) + 3 * hidden_half, abs=batch * table)


def test_pairs_by_hand() -> None:
    for window in (None, 1, 3, 5, 9):
        seen = sum(min(position + 1, window or 99) for position in range(5))
        assert attention_pairs(5, window) == seen
    assert attention_pairs(0, None) == 0


def test_a_known_model() -> None:
    spec = model_spec(QWEN_7B)
    # 7.62 G parameters with two vocabularies of 0.545 G, of which one is looked up; biases and norms multiply nothing
    assert matmul_parameters(spec) == pytest.approx(7.07e9, rel=2e-3)
    assert train_flops(spec, [1]) == pytest.approx(6 * matmul_parameters(spec), rel=1e-4)


def test_a_token_visits_only_its_experts() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    dense = model_spec({**sizes, "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 96})
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    mixture = model_spec({**sizes, **experts, "architectures": ["Qwen3MoeForCausalLM"], "intermediate_size": 999})
    assert matmul_parameters(mixture) - matmul_parameters(dense) == 2 * 64 * 8  # 3 * 32 is 96: only routers on top


def test_cost_of_a_sequence_is_its_length_and_more_the_longer_it_is() -> None:
    spec = model_spec(QWEN_7B)
    assert sample_cost(spec, 1) == pytest.approx(1.0, rel=1e-3)
    assert sample_cost(spec, 8192) > 2 * sample_cost(spec, 4096) > 4 * sample_cost(spec, 2048)
    lengths = [17, 900, 4096]
    ratios = {train_flops(spec, [length]) / sample_cost(spec, length) for length in lengths}
    assert max(ratios) == pytest.approx(min(ratios))
    assert train_flops(spec, lengths) == pytest.approx(sum(train_flops(spec, [length]) for length in lengths))


def test_tokens_without_logits_cost_nothing_in_the_head() -> None:
    spec = model_spec(QWEN_7B)
    head = 2 * spec.hidden * spec.vocab
    assert forward_flops(spec, [100, 50], trained=30) == pytest.approx(forward_flops(spec, [100, 50]) - 120 * head)
    assert forward_flops(spec, [100, 50], trained=150) == forward_flops(spec, [100, 50])
    assert sample_cost(spec, 1, trained=0) == pytest.approx(1 - head / 2 / matmul_parameters(spec), rel=1e-3)


def test_peaks_by_device_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 2060") is None
