"""Memory estimate: bytes that a trainer rank and an engine rank will hold, from the model's sizes and the config. Pure.

Weights, gradients and optimizer are exact up to padding. Activations are the tensors that layers keep for the backward
pass, at the peak (the first backward pass of a full pipeline). On a CPU they are those of trainer/local/layers.py, and
tests compare them with runs; on a GPU those that transformer-engine's layers are known to keep, not measured. Rows are
assumed to be long: attention over short rows on a CPU keeps a square matrix instead. Working memory (gradients of the
current layer or head) is an estimate, and all experts are assumed to get equally many tokens. Not included: buffers of
CUDA and NCCL, fragmentation, a bucket of the weight sync, gathers of a save.

Legend: `size` is the bytes of a weight or activation (2 or 4); values without a unit are bytes of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from collab_megatron.config.sections import EngineSection, OptimizerSection, ParallelSection, TrainSection
from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import EMBEDDING, FINAL_NORM, OUTPUT, ParameterRow, layer_rows, parameter_count

Reference = Literal["none", "model", "swap"]
FP32 = 4
INT64 = 8
# of trainer/actor/logprobs.py: bytes of a tile's fp32 logits, few enough to stay in a CPU's cache and enough to fill a
# GPU (measured on CPUs only); and its fewest columns: with fewer, matmuls of many tokens lose more than the cache gains
TILE_BYTES = {"cpu": 2**22, "cuda": 2**28}
TILE_COLUMNS = 1024
ENGINE_RESERVE, ENGINE_RESERVE_FROM = 10 * 2**30, 60 * 2**30
"""What SGLang leaves for its activations and CUDA graphs, on GPUs from that size on; a smaller GPU: the same share.
Upstream: sglang/srt/arg_groups/memory_hook.py (0.5.23)."""
RANK_OVERHEAD = 2 * 2**30
"""CUDA's context, NCCL's buffers and fragmentation of a trainer rank: an estimate, not measured."""
BUCKETS = 2  # of the weight sync, at a time
TILE_MULTIPLE = 128
"""A GPU reads rows in 16-byte pieces only where they begin at one; the number of tokens in a tile can be any."""


def tile_columns(tokens: int, *, device: str, chunk_bytes: int) -> int:
    """Vocabulary columns in one tile of trainer/actor/logprobs.py, whose fp32 logits take at most `chunk_bytes`."""
    column_bytes = FP32 * max(1, tokens)
    wanted = max(TILE_COLUMNS, TILE_BYTES.get(device, 0) // column_bytes)
    columns = max(1, min(wanted, chunk_bytes // column_bytes))
    return columns - columns % TILE_MULTIPLE if columns > TILE_MULTIPLE else columns


def size_of(dtype: str) -> int:
    """Bytes of one element of `float32` or `bfloat16`."""
    return {"float32": 4, "bfloat16": 2}[dtype]


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one trainer rank of a pipeline stage. All ranks of a stage are alike."""

    stage: int
    weights: int
    gradients: int  # fp32, for weights of any dtype
    optimizer: int  # fp32 master weights (bf16 only) and two moments: this rank's shard, the part on the device
    activations: int  # of all micro-batches in flight
    working: int  # of the current layer or head; an estimate
    reference: int  # the frozen model next to the policy
    host_optimizer: int  # the part that optimizer.cpu_offload puts on the host
    host_reference: int  # two copies of the weights, if the reference is swapped in

    @property
    def device(self) -> int:
        """The device's peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.reference

    @property
    def resident(self) -> int:
        """What stays on the device while the engines sample."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def host(self) -> int:
        return self.host_optimizer + self.host_reference


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one tensor-parallel rank of the engine."""

    weights: int
    kv_per_token: int
    kv_cache: int | None  # None: as many tokens as fit into engine.mem_fraction (or SGLang's own choice)


def trainer_memory(
    spec: ModelSpec,
    *,
    dtype: str,
    parallel: ParallelSection,
    optimizer: OptimizerSection,
    train: TrainSection,
    reference: Reference,
    device: str,
    tokens: int | None = None,
    micro_batches: int | None = None,
) -> list[RankMemory]:
    """One entry per pipeline stage.

    device: cpu | cuda. tokens: per micro-batch, padding included; None: train.micro_batch_tokens. micro_batches: per
    step and data rank; None: enough to fill the pipeline.
    """
    size = size_of(dtype)
    activations = _Activations(spec, size, parallel, train, device, tokens or train.micro_batch_tokens)
    found = []
    for stage in range(parallel.pipeline):
        dense, experts = stage_parameters(spec, parallel, stage)
        state = 2 * FP32 + (FP32 if size < FP32 else 0)
        copies = _copies(parallel)
        if not optimizer.shards_state(device=device, copies=copies[0]):
            copies = (1, 1)
        whole = math.ceil(dense / copies[0]) * state + math.ceil(experts / copies[1]) * state
        on_host = round(whole * optimizer.cpu_offload)
        weights = (dense + experts) * size
        found.append(
            RankMemory(
                stage=stage,
                weights=weights,
                gradients=(dense + experts) * FP32,
                optimizer=whole - on_host,
                activations=activations.of_stage(stage, micro_batches),
                working=activations.working(stage),
                reference=weights if reference == "model" else 0,
                host_optimizer=on_host,
                host_reference=2 * weights if reference == "swap" else 0,
            )
        )
    return found


def stage_parameters(spec: ModelSpec, parallel: ParallelSection, stage: int) -> tuple[int, int]:
    """Parameters on a rank of the stage: (parameters that all its data ranks hold, parameters of its experts)."""
    last = parallel.pipeline - 1
    # all layers are alike; interleaving moves layers between chunks, but their number on a stage stays
    layers = spec.layers // parallel.pipeline
    dense = layers * sum(_local(row, spec, parallel) for row in layer_rows(spec, 0) if row.expert is None)
    experts = layers * sum(_local(row, spec, parallel) for row in layer_rows(spec, 0) if row.expert == 0)
    if stage == 0 or (spec.tied and stage == last):
        dense += _local(EMBEDDING, spec, parallel)
    if stage == last:
        dense += _local(FINAL_NORM, spec, parallel) + (0 if spec.tied else _local(OUTPUT, spec, parallel))
    return dense, experts * (spec.experts // parallel.expert)


def _local(row: ParameterRow, spec: ModelSpec, parallel: ParallelSection) -> int:
    """Elements of one parameter on a rank that holds it."""
    dims = {**spec.dims, "vocab": spec.padded_vocab(parallel.tensor)}
    whole = sum(math.prod(dims[dim] for dim in shape) for shape in row.shapes)
    return whole if row.cut is None else whole // parallel.tensor


def _copies(parallel: ParallelSection) -> tuple[int, int]:
    """Ranks of a stage that hold the same (dense shard, expert shard). The optimizer state is split over them."""
    ranks = parallel.tensor * parallel.context * parallel.data
    return parallel.context * parallel.data, ranks // parallel.expert


def engine_memory(spec: ModelSpec, *, dtype: str, engine: EngineSection) -> EngineMemory:
    """With fewer KV heads than ranks, ranks hold copies of a head."""
    size, ranks = size_of(dtype), engine.tensor
    kv_heads = max(1, spec.kv_heads // ranks)
    per_token = 2 * spec.layers * kv_heads * spec.head_dim * size
    cache = None if engine.max_total_tokens is None else engine.max_total_tokens * per_token
    return EngineMemory(math.ceil(parameter_count(spec) * size / ranks), per_token, cache)


def colocated_share(stages: Sequence[RankMemory], *, gpu_bytes: int, bucket_bytes: int) -> float:
    """Share of a GPU for weights and KV cache of an engine rank next to a trainer rank (engine.mem_fraction).

    SGLang keeps the rest of what it finds free at its start; the trainer rank, which comes later, and the engine's
    runtime share that rest. Zero or less where nothing is left.
    """
    kept = max(stage.resident for stage in stages) + RANK_OVERHEAD + BUCKETS * bucket_bytes
    return 1 - (kept + engine_runtime(gpu_bytes)) / gpu_bytes


def engine_runtime(gpu_bytes: int) -> int:
    """Of an engine rank, besides weights and KV cache: CUDA's context, workspaces, CUDA graphs. An estimate."""
    return min(ENGINE_RESERVE, gpu_bytes * ENGINE_RESERVE // ENGINE_RESERVE_FROM)


class _Activations:
    """Bytes kept for the backward pass by trainer/local/layers.py, trainer/actor/logprobs.py, megatron's modules."""

    def __init__(
        self, spec: ModelSpec, size: int, parallel: ParallelSection, train: TrainSection, device: str, tokens: int
    ) -> None:
        self.spec, self.size, self.parallel, self.train = spec, size, parallel, train
        self.device, self.fused = device, device == "cuda"
        self.tokens = math.ceil(tokens / parallel.context)
        # tokens of norms and residuals, which sequence parallelism splits
        self.own_tokens = math.ceil(self.tokens / (parallel.tensor if parallel.sequence_parallel else 1))

    def of_stage(self, stage: int, micro_batches: int | None) -> int:
        """At the first backward pass, with the most micro-batches in flight."""
        parallel = self.parallel
        last = stage == parallel.pipeline - 1
        in_flight = chunks_in_flight(parallel, stage, micro_batches)
        layers = self.spec.layers // (parallel.pipeline * parallel.interleave)
        total = in_flight * (layers * self.kept_layer() + self.tokens * INT64)
        # the head is freed before the first layer is recomputed
        return total + max(self.head() if last else 0, self.layer() - self.kept_layer())

    def layer(self) -> int:
        """One layer without recomputation."""
        return self._attention() + self._mlp_input() + self._mlp()

    def kept_layer(self) -> int:
        """The part of a layer that is kept after its forward pass."""
        if self.train.recompute == "full":
            return self.own_tokens * self.spec.hidden * self.size
        if self.train.recompute == "selective":
            return self._attention() + self._mlp_input()
        return self.layer()

    def head(self) -> int:
        """Final norm, the hidden states that the logits are computed from, and the softmax if its budget allows."""
        spec, size = self.spec, self.size
        columns = self._columns()
        tiles = math.ceil(columns / self._tile_columns())
        gathered = self.tokens * spec.hidden * size if self.own_tokens < self.tokens else 0
        statistics = self.tokens * (INT64 + 2 * FP32 * tiles + 2 * FP32)
        softmax = self.tokens * columns * size if self._keeps_softmax() else 0
        return self._norm(spec.hidden) * self.own_tokens + self._hidden() + gathered + statistics + softmax

    def working(self, stage: int) -> int:
        """The largest gradients next to the kept activations: those of an MLP, or of the head."""
        spec, size, tensor = self.spec, self.size, self.parallel.tensor
        width = spec.expert_ffn * spec.experts_per_token if spec.experts else spec.ffn / tensor
        own = self.own_tokens if spec.experts else self.tokens
        layer = round(4 * width * own * size) + 2 * self.tokens * spec.hidden * size
        layer += (2 * spec.expert_ffn if spec.experts else 2 * spec.ffn // tensor) * spec.hidden * size
        vocabulary = _local(EMBEDDING, spec, self.parallel) * size
        if stage < self.parallel.pipeline - 1:
            return max(layer, vocabulary if stage == 0 else 0)
        tile = self.tokens * self._tile_columns() * (2 * FP32 + (size if size < FP32 else 0))
        gradients = vocabulary + self.tokens * spec.hidden * (FP32 + 3 * size)
        # tiles are computed in the forward pass, and again in the backward pass only if none was kept
        return max(layer, tile, gradients + (0 if self._keeps_softmax() else tile))

    def _attention(self) -> int:
        """Norm and its output; the fused projection; query and key after rotation; flash attention's statistics and its
        result (twice without transformer-engine: in attention's layout, and in that of the next projection).
        """
        spec, size = self.spec, self.size
        query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        kept = (query + 2 * key + query + key + query * (1 if self.fused else 2)) * size + spec.heads * FP32
        if spec.qk_norm:
            kept += self._norm(spec.head_dim) * (spec.heads + spec.kv_heads)
        inside = math.ceil(kept * self.tokens / self.parallel.tensor)
        return self._norm(spec.hidden) * self.own_tokens + self._hidden() + inside

    def _mlp_input(self) -> int:
        return self._norm(self.spec.hidden) * self.own_tokens + self._hidden()

    def _mlp(self) -> int:
        """Gate and up fused, and SwiGLU's result; for experts also its unfused steps, and the routing."""
        spec, size = self.spec, self.size
        if not spec.experts:
            return math.ceil(3 * spec.ffn * size * self.tokens / self.parallel.tensor)
        routed = (3 if self.fused else 6) * spec.expert_ffn * size + spec.hidden * size + 2 * INT64 + FP32 + size
        return (spec.experts_per_token * routed + spec.experts * (1 + size)) * self.own_tokens

    def _norm(self, width: int) -> int:
        """Per token, without the output: the normalized input (transformer-engine: the input) and the scale."""
        return width * self.size + FP32

    def _hidden(self) -> int:
        return self.own_tokens * self.spec.hidden * self.size

    def _columns(self) -> int:
        """Vocabulary rows on a rank."""
        return self.spec.padded_vocab(self.parallel.tensor) // self.parallel.tensor

    def _keeps_softmax(self) -> bool:
        return FP32 * self.tokens * self._columns() <= self.train.logits_chunk_mb * 2**20

    def _tile_columns(self) -> int:
        chunk_bytes = self.train.logits_chunk_mb * 2**20
        return min(self._columns(), tile_columns(self.tokens, device=self.device, chunk_bytes=chunk_bytes))


def chunks_in_flight(parallel: ParallelSection, stage: int, micro_batches: int | None) -> int:
    """The most forward passes of a chunk that wait for their backward pass, in megatron's 1F1B or interleaved order."""
    stages, chunks = parallel.pipeline, parallel.interleave
    most = stages - stage if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return most if micro_batches is None else min(most, micro_batches * chunks)
