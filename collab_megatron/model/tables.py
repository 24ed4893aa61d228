"""Table of Megatron parameters and the Hugging Face tensors that each consists of, one row each. Pure: no torch.

A row holds the tensors' shapes by dimension name (ModelSpec.dims), the dimension that tensor parallelism cuts, and the
way in which several tensors are joined into one. `{layer}` and `{expert}` count from 0 over the whole model. Names are
those of Megatron's local layers. Transformer-engine's layers fuse two norms into the next projection and number the
weights of grouped experts; `ALIASES` maps these names back. They leave the norm before a mixture of experts alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from collab_megatron.model.spec import ModelSpec

Join = Literal["none", "qkv", "gate_up"]


@dataclass(frozen=True)
class ParameterRow:
    """One Megatron parameter. Names in the tables below may hold `{layer}` and `{expert}`; in `rows` they never do."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]  # of each HF tensor, as names of ModelSpec.dims
    cut: int | None  # the dimension that tensor parallelism cuts; None: every rank holds the whole tensor
    join: Join = "none"
    layer: int | None = None  # None: outside the layers
    expert: int | None = None  # its expert, numbered over the whole model: only that expert's ranks hold it

    @property
    def is_vocab(self) -> bool:
        """Whether its rows are the vocabulary, which Megatron pads and Hugging Face does not."""
        return self.shapes[0][0] == "vocab"

    def at(self, layer: int, expert: int | None = None) -> ParameterRow:
        """The row with the layer and expert numbers filled in."""

        def fill(name: str) -> str:
            return name.format(layer=layer, expert=expert)

        return replace(self, megatron=fill(self.megatron), hf=tuple(map(fill, self.hf)), layer=layer, expert=expert)


_M = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

EMBEDDING = ParameterRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (("vocab", "hidden"),), 0)
FINAL_NORM = ParameterRow("decoder.final_layernorm.weight", ("model.norm.weight",), (("hidden",),), None)
OUTPUT = ParameterRow("output_layer.weight", ("lm_head.weight",), (("vocab", "hidden"),), 0)

INPUT_NORM = ParameterRow(_M + "input_layernorm.weight", (_H + "input_layernorm.weight",), (("hidden",),), None)
QKV_WEIGHT = ParameterRow(
    _M + "self_attention.linear_qkv.weight",
    tuple(_H + name + ".weight" for name in _QKV),
    (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
    0,
    "qkv",
)
QKV_BIAS = ParameterRow(
    _M + "self_attention.linear_qkv.bias",
    tuple(_H + name + ".bias" for name in _QKV),
    (("q",), ("kv",), ("kv",)),
    0,
    "qkv",
)
Q_NORM = ParameterRow(_M + "self_attention.q_layernorm.weight", (_H + "self_attn.q_norm.weight",), (("head",),), None)
K_NORM = ParameterRow(_M + "self_attention.k_layernorm.weight", (_H + "self_attn.k_norm.weight",), (("head",),), None)
ATTENTION_OUT = ParameterRow(
    _M + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), (("hidden", "q"),), 1
)
MLP_NORM = ParameterRow(
    _M + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), (("hidden",),), None
)
MLP_IN = ParameterRow(
    _M + "mlp.linear_fc1.weight",
    (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
    (("ffn", "hidden"), ("ffn", "hidden")),
    0,
    "gate_up",
)
MLP_OUT = ParameterRow(_M + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), (("hidden", "ffn"),), 1)

ROUTER = ParameterRow(_M + "mlp.router.weight", (_H + "mlp.gate.weight",), (("experts", "hidden"),), None)
# each expert is whole on one expert-parallel rank: its tensor-parallel size is 1
_EXPERT = _M + "mlp.experts.local_experts.{expert}."
EXPERT_IN = ParameterRow(
    _EXPERT + "linear_fc1.weight",
    (_H + "mlp.experts.{expert}.gate_proj.weight", _H + "mlp.experts.{expert}.up_proj.weight"),
    (("expert_ffn", "hidden"), ("expert_ffn", "hidden")),
    None,
    "gate_up",
)
EXPERT_OUT = ParameterRow(
    _EXPERT + "linear_fc2.weight",
    (_H + "mlp.experts.{expert}.down_proj.weight",),
    (("hidden", "expert_ffn"),),
    None,
)

# end of transformer-engine's parameter name, as a regular expression -> the table's name
ALIASES = {
    r"self_attention\.linear_qkv\.layer_norm_weight": "input_layernorm.weight",
    r"mlp\.linear_fc1\.layer_norm_weight": "pre_mlp_layernorm.weight",
    r"mlp\.experts\.(linear_fc[12])\.weight(\d+)": r"mlp.experts.local_experts.\2.\1.weight",
}


def canonical_name(megatron_name: str) -> str:
    """A parameter's name in the table, whether local or transformer-engine layers built the model."""
    for theirs, ours in ALIASES.items():
        name, count = re.subn(rf"(?<=\.){theirs}$", ours, megatron_name)
        if count:
            return name
    return megatron_name


def layer_rows(spec: ModelSpec, layer: int) -> Iterator[ParameterRow]:
    """The rows of one layer, numbers filled in, in streaming order."""
    attention = [INPUT_NORM, QKV_WEIGHT]
    if spec.qkv_bias:
        attention.append(QKV_BIAS)
    if spec.qk_norm:
        attention += [Q_NORM, K_NORM]
    mlp = [ROUTER] if spec.experts else [MLP_IN, MLP_OUT]
    for row in [*attention, ATTENTION_OUT, MLP_NORM, *mlp]:
        yield row.at(layer)
    for expert in range(spec.experts):
        yield EXPERT_IN.at(layer, expert)
        yield EXPERT_OUT.at(layer, expert)


def rows(spec: ModelSpec) -> Iterator[ParameterRow]:
    """All rows of the model, numbers filled in, in streaming order."""
    yield EMBEDDING
    for layer in range(spec.layers):
        yield from layer_rows(spec, layer)
    yield FINAL_NORM
    if not spec.tied:
        yield OUTPUT


def parameter_count(spec: ModelSpec) -> int:
    """Number of parameters of the whole model. A tied output projection counts once."""
    return sum(math.prod(spec.dims[dim] for dim in dims) for row in rows(spec) for dims in row.shapes)
