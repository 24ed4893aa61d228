"""Which Hugging Face tensors make up which Megatron parameter, one row each. Pure: no torch.

A row names its tensors' shapes by dimension (ModelSpec.dims), the dimension along which tensor parallelism cuts them,
and how several tensors are joined into one. `{layer}` counts from 0. Names are those of Megatron's local spec; the
transformer-engine spec fuses two norms into the next projection, which `ALIASES` undoes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from collab_megatron.convert.spec import ModelSpec

Join = Literal["none", "qkv", "gate_up"]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter. `{layer}` stands in both names where `per_layer`."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]  # of each HF tensor, as names of ModelSpec.dims
    cut: int | None  # dimension that tensor parallelism cuts; None: every rank holds the whole tensor
    join: Join = "none"

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    @property
    def is_vocab(self) -> bool:
        """Its rows are the vocabulary: padded in Megatron, not in Hugging Face."""
        return self.shapes[0][0] == "vocab"

    def at(self, layer: int) -> Row:
        """The row with the layer's number filled in."""
        names = tuple(name.format(layer=layer) for name in self.hf)
        return Row(self.megatron.format(layer=layer), names, self.shapes, self.cut, self.join)


_M = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (("vocab", "hidden"),), 0)
FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",), (("hidden",),), None)
OUTPUT = Row("output_layer.weight", ("lm_head.weight",), (("vocab", "hidden"),), 0)

INPUT_NORM = Row(_M + "input_layernorm.weight", (_H + "input_layernorm.weight",), (("hidden",),), None)
QKV_WEIGHT = Row(
    _M + "self_attention.linear_qkv.weight",
    tuple(_H + name + ".weight" for name in _QKV),
    (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
    0,
    "qkv",
)
QKV_BIAS = Row(
    _M + "self_attention.linear_qkv.bias",
    tuple(_H + name + ".bias" for name in _QKV),
    (("q",), ("kv",), ("kv",)),
    0,
    "qkv",
)
Q_NORM = Row(_M + "self_attention.q_layernorm.weight", (_H + "self_attn.q_norm.weight",), (("head",),), None)
K_NORM = Row(_M + "self_attention.k_layernorm.weight", (_H + "self_attn.k_norm.weight",), (("head",),), None)
ATTENTION_OUT = Row(_M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), (("hidden", "q"),), 1)
MLP_NORM = Row(_M + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), (("hidden",),), None)
MLP_IN = Row(
    _M + "mlp.linear_fc1.weight",
    (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
    (("ffn", "hidden"), ("ffn", "hidden")),
    0,
    "gate_up",
)
MLP_OUT = Row(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), (("hidden", "ffn"),), 1)

ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def canonical_name(megatron_name: str) -> str:
    """A parameter's name as it stands in the table, whichever layer spec built the model."""
    for fused, plain in ALIASES.items():
        if megatron_name.endswith(fused):
            return megatron_name.removesuffix(fused) + plain
    return megatron_name


def layer_rows(spec: ModelSpec) -> list[Row]:
    """The rows of one layer, in the order in which they are streamed."""
    rows = [INPUT_NORM, QKV_WEIGHT]
    if spec.qkv_bias:
        rows.append(QKV_BIAS)
    if spec.qk_norm:
        rows += [Q_NORM, K_NORM]
    return [*rows, ATTENTION_OUT, MLP_NORM, MLP_IN, MLP_OUT]


def rows(spec: ModelSpec) -> Iterator[Row]:
    """Every row of the model, layers filled in, in the order in which tensors are streamed."""
    yield EMBEDDING
    for layer in range(spec.layers):
        for row in layer_rows(spec):
            yield row.at(layer)
    yield FINAL_NORM
    if not spec.tied:
        yield OUTPUT


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the whole model; a tied output projection counts once."""
    return sum(math.prod(spec.dims[dim] for dim in dims) for row in rows(spec) for dims in row.shapes)
