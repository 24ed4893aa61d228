"""Floating-point operations of a model on sequences of given lengths, and what share of a device's peak that is. Pure.

What is counted is what the model needs, not what an implementation happens to do (PaLM, appendix B, 2022): matrix
products and causal attention, 2 operations per multiply-add, a backward pass of twice the forward; norms, rotary
embeddings, softmax and everything computed a second time (recomputation, flash attention's backward) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.model.spec import ModelSpec

# dense bf16 with fp32 accumulation, in FLOP/s, from NVIDIA's data sheets (the half of those "with sparsity"); the first
# name that the device's contains holds
PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bf16 of a device as torch.cuda.get_device_name calls it; None where the table does not know it."""
    return next((peak for name, peak in PEAKS if name in device_name), None)


def matmul_parameters(spec: ModelSpec) -> int:
    """Weights that one token is multiplied with: projections and output head; not the embedding, which is looked up."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = spec.hidden * (q + 2 * kv) + q * spec.hidden
    mlp = 3 * spec.hidden * spec.ffn
    if spec.experts:  # those that the router chooses for a token, and the router
        mlp = 3 * spec.hidden * spec.experts_per_token * spec.expert_ffn + spec.hidden * spec.experts
    return spec.layers * (attention + mlp) + spec.hidden * spec.vocab


def attention_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of one causal sequence: a token sees itself and all before it, or the window's last ones."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def forward_flops(spec: ModelSpec, lengths: Sequence[int]) -> float:
    """Of one forward pass, output head included, over sequences of `lengths` tokens, padding not among them."""
    pairs = sum(attention_pairs(length, spec.sliding_window) for length in lengths)
    per_pair = 4 * spec.layers * spec.heads * spec.head_dim  # query * key, and weight * value
    return 2.0 * matmul_parameters(spec) * sum(lengths) + float(per_pair * pairs)


def train_flops(spec: ModelSpec, lengths: Sequence[int]) -> float:
    """Of one forward and backward pass; the optimizer's few operations per parameter are left out."""
    return 3.0 * forward_flops(spec, lengths)


def sample_cost(spec: ModelSpec, length: int) -> float:
    """What one sequence costs, in tokens: its length, plus the tokens whose matrix products cost what attention does.

    For balancing data ranks, where two sequences of 4k are cheaper than one of 8k. The same for forward and training.
    """
    return forward_flops(spec, [length]) / (2.0 * matmul_parameters(spec))
