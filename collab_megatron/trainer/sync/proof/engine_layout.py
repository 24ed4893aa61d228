"""The tensors that an SGLang server holds, and the parts of Hugging Face tensors that each rank's is made of. Pure.

As in SGLang 0.5.23 with plain tensor parallelism (no expert, pipeline or data-parallel attention), unquantized:
- srt/layers/linear.py: qkv_proj is q, k and v in this order, gate_up_proj is gate and up; ranks divide each by rows,
  o_proj and down_proj by columns. With fewer key/value heads than ranks, neighboring ranks hold the same head.
- srt/layers/vocab_parallel_embedding.py: the vocabulary is padded with rows of zeros to a multiple of 64.
- srt/layers/moe/fused_moe_triton/layer.py: w13_weight holds every expert's gate and up, w2_weight every down.
- srt/models/{llama,qwen2,qwen3}.py: a tied lm_head is the embedding itself and has no name of its own.
- srt/configs/update_config.py, on CPU only: key/value heads, and columns of MLPs and experts, are padded with zeros
  until the ranks divide them evenly.

Not covered, because they change tensors after loading or place them elsewhere: SGLang's AMX kernels for CPUs,
`--moe-runner-backend flashinfer_*`, SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED, `--ep-size`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import EMBEDDING, FINAL_NORM, OUTPUT, ParameterRow, layer_rows

Device = Literal["cpu", "cuda"]

VOCAB_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE of vocab_parallel_embedding.py
CPU_COLUMN_PADDING = 32  # DEFAULT_MOE_PADDING_SIZE of update_config.py; dense MLPs too

_FUSED = (
    (re.compile(r"self_attn\.[qkv]_proj\."), "self_attn.qkv_proj."),
    (re.compile(r"mlp\.(gate|up)_proj\."), "mlp.gate_up_proj."),
    (re.compile(r"mlp\.experts\.\d+\.(gate|up)_proj\.weight"), "mlp.experts.w13_weight"),
    (re.compile(r"mlp\.experts\.\d+\.down_proj\.weight"), "mlp.experts.w2_weight"),
)
_PARTS = {
    "self_attn.qkv_proj.": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "mlp.gate_up_proj.": ("mlp.gate_proj.", "mlp.up_proj."),
    "mlp.experts.w13_weight": ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
    "mlp.experts.w2_weight": ("mlp.experts.*.down_proj.weight",),
}


@dataclass(frozen=True)
class RankSplit:
    """How ranks divide one dimension."""

    width: int  # of each rank's part; zeros past the end of the tensor
    replicas: int = 1  # neighboring ranks that hold the same part


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor that goes into an engine tensor, which holds its parts row-major."""

    hf: str
    shape: tuple[int, ...]
    cut: int | None  # dimension that ranks divide; None: every rank holds the whole tensor
    split: RankSplit

    def part(self, rank: int) -> tuple[int, int]:
        """[start, stop) along `cut` of what `rank` holds; empty where its whole part is padding."""
        assert self.cut is not None, f"{self.hf} is not cut"
        size = self.shape[self.cut]
        start = rank // self.split.replicas * self.split.width
        return min(start, size), min(start + self.split.width, size)

    @property
    def elements(self) -> int:
        """Number in one rank's part, padding included."""
        whole = math.prod(self.shape)
        return whole if self.cut is None else whole // self.shape[self.cut] * self.split.width


@dataclass(frozen=True)
class EngineTensor:
    """One tensor of an SGLang server, under the server's name for it."""

    name: str
    sources: tuple[Source, ...]  # in byte order, which is the order of the export stream

    @property
    def same_on_all_ranks(self) -> bool:
        return all(source.cut is None for source in self.sources)

    @property
    def elements(self) -> int:
        """Number in one rank's tensor, padding included."""
        return sum(source.elements for source in self.sources)


def unit_count(spec: ModelSpec) -> int:
    """Number of units that the proof checks: 0 is the embedding, 1 + i layer i, the last the final norm and output."""
    return spec.layers + 2


def engine_tensors(spec: ModelSpec, unit: int, *, ranks: int, device: Device) -> Iterator[EngineTensor]:
    """The tensors of one unit, as a server of `ranks` tensor-parallel ranks on `device` holds them."""
    if unit == 0:
        rows: Iterator[ParameterRow] = iter((EMBEDDING,))
    elif unit <= spec.layers:
        rows = layer_rows(spec, unit - 1)
    else:
        rows = iter((FINAL_NORM,) if spec.tied else (FINAL_NORM, OUTPUT))
    splits = _splits(spec, ranks, device)
    found: dict[str, list[Source]] = {}
    for row in rows:
        for hf, dims in zip(row.hf, row.shapes, strict=True):
            cut = next((axis for axis, dim in enumerate(dims) if dim in splits), None)
            split = RankSplit(0) if cut is None else splits[dims[cut]]
            source = Source(hf, tuple(spec.dims[dim] for dim in dims), cut, split)
            found.setdefault(engine_name(hf), []).append(source)
    for name, sources in found.items():
        yield EngineTensor(name, tuple(sources))


def engine_name(hf_name: str) -> str:
    """The server's name of the tensor into which a Hugging Face tensor is loaded."""
    for pattern, fused in _FUSED:
        name, count = pattern.subn(fused, hf_name)
        if count:
            return name
    return hf_name


def hf_names(name: str) -> tuple[str, ...]:
    """The Hugging Face tensors in a server's tensor, for messages; `*` stands for every expert."""
    for fused, parts in _PARTS.items():
        if fused in name:
            return tuple(name.replace(fused, part) for part in parts)
    return (name,)


def _splits(spec: ModelSpec, ranks: int, device: Device) -> Mapping[str, RankSplit]:
    """Dimension (ModelSpec.dims) -> how ranks divide it, for those that they divide. A shape has at most one."""
    vocab = _up(spec.vocab, VOCAB_PADDING)
    if vocab % ranks:
        vocab = _up(spec.vocab, VOCAB_PADDING * ranks)
    heads, kv_heads, column_multiple = spec.heads, spec.kv_heads, ranks
    if device == "cpu":
        column_multiple = ranks * CPU_COLUMN_PADDING
        if heads % ranks or kv_heads % ranks:
            kv_heads = _up(kv_heads, ranks)
            heads = kv_heads * (spec.heads // spec.kv_heads)
    replicas = max(1, ranks // kv_heads)
    return {
        "vocab": RankSplit(vocab // ranks),
        "q": RankSplit(heads // ranks * spec.head_dim),
        "kv": RankSplit(max(1, kv_heads // ranks) * spec.head_dim, replicas),
        "ffn": RankSplit(_up(spec.ffn, column_multiple) // ranks),
        "expert_ffn": RankSplit(_up(spec.expert_ffn, column_multiple) // ranks),
    }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
