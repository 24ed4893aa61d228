"""The memory formula, counted by hand on a tiny model; test_memory_parallel.py compares it with runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from collab_megatron.config.sections import EngineSection, OptimizerSection, ParallelSection, TrainSection
from collab_megatron.model.memory import (
    RankMemory,
    chunks_in_flight,
    engine_memory,
    stage_parameters,
    tile_columns,
    trainer_memory,
)
from collab_megatron.model.spec import ModelSpec, RopeSpec
from collab_megatron.model.tables import parameter_count

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    hidden=8,
    layers=4,
    heads=2,
    kv_heads=2,
    head_dim=4,
    ffn=16,
    vocab=64,
    max_positions=128,
    norm_eps=1e-5,
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    rope=RopeSpec(10000.0),
    sliding_window=None,
    init_std=0.02,
)
NORMS = 2 * 8
MATRICES = 3 * 8 * 8 + 8 * 8 + 3 * 16 * 8  # of one layer: query, key and value; output; gate, up and down
LAYER = NORMS + MATRICES
VOCABULARY = 64 * 8
EXPERTS = replace(SPEC, architecture="Qwen3MoeForCausalLM", experts=4, experts_per_token=2, expert_ffn=4)
TOKENS = 10


def memory(spec: ModelSpec = SPEC, **changes: Any) -> list[RankMemory]:
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "parallel": ParallelSection(),
        "optimizer": OptimizerSection(),
        "train": TrainSection(micro_batch_tokens=TOKENS),
        "reference": "none",
        "device": "cpu",
    }
    return trainer_memory(spec, **{**settings, **changes})


def test_parameters_of_every_stage() -> None:
    assert stage_parameters(SPEC, ParallelSection(), 0) == (parameter_count(SPEC), 0)
    two = ParallelSection(pipeline=2)
    assert stage_parameters(SPEC, two, 0) == (2 * LAYER + VOCABULARY, 0)
    assert stage_parameters(SPEC, two, 1) == (2 * LAYER + VOCABULARY + 8, 0)
    # a tied embedding is on both ends, and once where these are one
    tied = replace(SPEC, tied=True)
    assert stage_parameters(tied, two, 1) == (2 * LAYER + VOCABULARY + 8, 0)
    assert stage_parameters(tied, ParallelSection(), 0) == (4 * LAYER + VOCABULARY + 8, 0)
    # interleaving moves layers, not their number
    assert stage_parameters(SPEC, ParallelSection(pipeline=2, interleave=2), 0) == (2 * LAYER + VOCABULARY, 0)
    # tensor parallelism cuts matrices and vocabulary, not norms
    halved = 4 * (NORMS + MATRICES // 2) + 2 * VOCABULARY // 2 + 8
    assert stage_parameters(SPEC, ParallelSection(tensor=2), 0) == (halved, 0)
    # the vocabulary is padded to a multiple of 64
    assert stage_parameters(replace(SPEC, vocab=65), ParallelSection(), 0)[0] == 4 * LAYER + 2 * 128 * 8 + 8


def test_experts_are_spread_over_their_ranks() -> None:
    expert = 3 * 4 * 8
    assert stage_parameters(EXPERTS, ParallelSection(), 0)[1] == 4 * 4 * expert
    assert sum(stage_parameters(EXPERTS, ParallelSection(), 0)) == parameter_count(EXPERTS)
    dense, experts = stage_parameters(EXPERTS, ParallelSection(data=4, expert=2), 0)
    assert experts == 4 * 2 * expert
    # of four data ranks all share the dense optimizer, two each expert's
    distributed = OptimizerSection(distributed=True)
    (rank,) = memory(EXPERTS, parallel=ParallelSection(data=4, expert=2), optimizer=distributed)
    assert rank.optimizer == 12 * (dense // 4 + experts // 2)


def test_bytes_per_parameter() -> None:
    params = parameter_count(SPEC)
    (bf16,) = memory()
    assert (bf16.weights, bf16.gradients, bf16.optimizer, bf16.host) == (2 * params, 4 * params, 12 * params, 0)
    (fp32,) = memory(dtype="float32")
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * params, 4 * params, 8 * params)
    distributed = OptimizerSection(distributed=True, cpu_offload=0.25)
    (spread,) = memory(parallel=ParallelSection(data=2, context=2), optimizer=distributed)
    assert spread.optimizer + spread.host_optimizer == 12 * params // 4
    assert spread.host_optimizer == 12 * params // 4 // 4
    # data ranks share nothing else
    assert (spread.weights, spread.gradients) == (bf16.weights, bf16.gradients)


def test_the_reference_is_on_the_device_or_twice_on_the_host() -> None:
    (none,), (model,), (swap,) = (memory(reference=kind) for kind in ("none", "model", "swap"))
    assert (none.reference, none.host_reference) == (0, 0)
    assert (model.reference, model.host_reference) == (model.weights, 0)
    assert (swap.reference, swap.host_reference) == (0, 2 * swap.weights)
    assert model.device == none.device + model.weights


def test_activations_by_hand() -> None:
    """bf16, one rank; per token and layer: two norms (normalised input, scale, output), attention, MLP."""
    norm = 8 * 2 + 4 + 8 * 2
    attention = 2 * (3 * 8 + 2 * 8 + 2 * 8) + 2 * 4  # projection; rotated query and key; result twice; statistics
    head = norm + 8 + 2 * 4 + 2 * 4 + 64 * 2  # label, statistics of one tile and of the row, kept softmax
    kept = {
        "none": 2 * norm + attention + 3 * 16 * 2,
        "selective": 2 * norm + attention,
        "full": 8 * 2,
    }
    for recompute, layer in kept.items():
        (rank,) = memory(train=TrainSection(micro_batch_tokens=TOKENS, recompute=recompute))
        # in the backward pass one layer is whole again, but the head is done with then
        again = kept["none"] - layer
        assert rank.activations == TOKENS * (4 * layer + 8 + max(head, again)), recompute


def test_the_head_keeps_its_softmax_only_within_the_budget() -> None:
    tokens = 2**20  # times 64 columns of fp32: 256 MB
    (kept,) = memory(train=TrainSection(micro_batch_tokens=tokens, logits_chunk_mb=256))
    (again,) = memory(train=TrainSection(micro_batch_tokens=tokens, logits_chunk_mb=255))
    assert 0.9 < (kept.activations - again.activations) / (tokens * 64 * 2) <= 1


def test_what_parallelism_divides() -> None:
    def activations(**parallel: Any) -> int:
        (rank,) = memory(parallel=ParallelSection(**parallel))
        return rank.activations

    alone = activations()
    assert activations(context=2) == pytest.approx(alone / 2, rel=0.01)
    assert alone / 2 < activations(tensor=2, sequence_parallel=True) < activations(tensor=2) < alone
    assert activations(data=2) == alone


def test_pipeline_stages_hold_as_many_micro_batches_as_are_under_way() -> None:
    four = ParallelSection(pipeline=4)
    assert [chunks_in_flight(four, stage, None) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(four, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    interleaved = ParallelSection(pipeline=2, interleave=2)
    assert [chunks_in_flight(interleaved, stage, None) for stage in range(2)] == [5, 3]
    assert [chunks_in_flight(interleaved, stage, 2) for stage in range(2)] == [4, 3]
    first, last = memory(parallel=ParallelSection(pipeline=2))
    layer = TOKENS * (2 * (8 * 2 + 4 + 8 * 2) + 2 * 56 + 8 + 3 * 16 * 2)
    assert first.activations == 2 * (2 * layer + TOKENS * 8)
    head = TOKENS * (8 * 2 + 4 + 8 * 2 + 8 + 2 * 4 + 2 * 4 + 64 * 2)
    assert last.activations == 2 * layer + TOKENS * 8 + head


def test_the_engine_copies_heads_that_are_too_few() -> None:
    engine = EngineSection(max_total_tokens=1000)
    alone = engine_memory(SPEC, dtype="bfloat16", engine=engine)
    assert (alone.weights, alone.kv_per_token) == (2 * parameter_count(SPEC), 2 * 4 * 2 * 4 * 2)
    assert alone.kv_cache == 1000 * alone.kv_per_token
    four = engine_memory(SPEC, dtype="bfloat16", engine=engine.model_copy(update={"tensor": 4}))
    assert four.kv_per_token == alone.kv_per_token // 2
    assert engine_memory(SPEC, dtype="float32", engine=EngineSection()).kv_cache is None


def test_a_llama_of_eight_billion() -> None:
    """Widely known figures: 8.03 G parameters, 18 bytes of each in bf16 training, 128 KiB of KV cache a token."""
    llama = replace(
        SPEC, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, max_positions=8192
    )
    assert parameter_count(llama) == 8_030_261_248
    assert engine_memory(llama, dtype="bfloat16", engine=EngineSection()).kv_per_token == 128 * 2**10
    (rank,) = memory(llama, device="cuda", train=TrainSection(recompute="full"))
    assert rank.weights + rank.gradients + rank.optimizer == 18 * 8_030_261_248
    inputs = 32 * 8192 * 4096 * 2
    assert inputs < rank.activations < 1.6 * inputs  # one layer is whole again in the backward pass


def test_data_ranks_on_gpus_share_the_optimizer_state_unless_told_otherwise() -> None:
    (alone,), (cpu,) = memory(device="cuda"), memory(parallel=ParallelSection(data=4))
    four = ParallelSection(data=4)
    (shared,) = memory(device="cuda", parallel=four)
    (whole,) = memory(device="cuda", parallel=four, optimizer=OptimizerSection(distributed=False))
    assert alone.optimizer == cpu.optimizer == whole.optimizer == 4 * shared.optimizer


def test_a_tile_begins_where_a_gpu_can_read_it() -> None:
    assert tile_columns(1733, device="cuda", chunk_bytes=2**29) == 38656  # of 38,724
    assert tile_columns(10**6, device="cuda", chunk_bytes=2**29) == 128
    assert tile_columns(10**7, device="cuda", chunk_bytes=2**29) == 13
