"""FLOPs of a model on sequences of given lengths, and the peak FLOP/s of known devices. Pure.

Model FLOPs, not hardware FLOPs (PaLM, appendix B, 2022): matrix products and causal attention, 2 operations per
multiply-add, a backward pass of twice the forward. Not counted: norms, rotary embeddings, softmax, and everything that
is computed a second time (recomputation, flash attention's backward).
"""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.model.spec import ModelSpec

# dense bf16 with fp32 accumulation, in FLOP/s, from NVIDIA's data sheets (half of the figures "with sparsity");
# the first name that is part of the device's name applies
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
    """Peak bf16 FLOP/s of a device by its torch.cuda.get_device_name; None for an unknown device."""
    return next((peak for name, peak in PEAKS if name in device_name), None)


def matmul_parameters(spec: ModelSpec) -> int:
    """Weights that take part in one token's matrix products: projections and output head, not the embedding lookup."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = spec.hidden * (q + 2 * kv) + q * spec.hidden
    mlp = 3 * spec.hidden * spec.ffn
    if spec.experts:  # the experts that the router chooses for a token, and the router
        mlp = 3 * spec.hidden * spec.experts_per_token * spec.expert_ffn + spec.hidden * spec.experts
    return spec.layers * (attention + mlp) + spec.hidden * spec.vocab


def attention_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of one causal sequence: each token attends to itself and all earlier ones, or to a window."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def forward_flops(spec: ModelSpec, lengths: Sequence[int], trained: int | None = None) -> float:
    """FLOPs of one forward pass over sequences of `lengths` tokens. Padding is not counted.

    trained: tokens of all sequences that have logits; None: all.
    """
    tokens = sum(lengths)
    pairs = sum(attention_pairs(length, spec.sliding_window) for length in lengths)
    per_pair = 4 * spec.layers * spec.heads * spec.head_dim  # query * key, and weight * value
    without_logits = 0 if trained is None else tokens - trained
    products = matmul_parameters(spec) * tokens - spec.hidden * spec.vocab * without_logits
    return 2.0 * products + float(per_pair * pairs)


def train_flops(spec: ModelSpec, lengths: Sequence[int], trained: int | None = None) -> float:
    """FLOPs of one forward and backward pass. The optimizer's few operations per parameter are not counted."""
    return 3.0 * forward_flops(spec, lengths, trained)


def sample_cost(spec: ModelSpec, length: int, trained: int | None = None) -> float:
    """Cost of one sequence in tokens: its length, plus attention's FLOPs converted into tokens of matrix products,
    minus the output head's of the tokens that are not trained.

    Balances data ranks: two sequences of 4k are cheaper than one of 8k. The same for forward and training.
    """
    return forward_flops(spec, [length], trained) / token_flops(spec)


def token_flops(spec: ModelSpec) -> float:
    """FLOPs of sample_cost's unit: the matrix products of one token's forward pass, logits included."""
    return 2.0 * matmul_parameters(spec)
