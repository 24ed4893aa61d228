"""The checksums that a server must report: against the naive sum of parts, SGLang's own kernel, and real servers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from collab_megatron.errors import RunError
from collab_megatron.model.spec import ModelSpec, model_spec
from collab_megatron.model.tables import rows
from collab_megatron.trainer.sync.proof import checksums
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums, compare, merge, skip_patterns, units_of_sync
from collab_megatron.trainer.sync.proof.engine_layout import Device, engine_tensors, hf_names, unit_count
from tests.trainer.parallel.tiny import KINDS, spec_of
from tests.trainer.sync.conftest import TinyServer

HASH_FILE = "kernels/ops/memory/gpu_tensor_hash.py"


def random_weights(spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """In the order of the export stream."""
    torch.manual_seed(seed)
    return {
        name: torch.randn([spec.dims[dim] for dim in dims]).to(dtype)
        for row in rows(spec)
        for name, dims in zip(row.hf, row.shapes, strict=True)
    }


def expected_of(
    spec: ModelSpec, weights: dict[str, Tensor], ranks: int, units: frozenset[int] | None = None, device: Device = "cpu"
) -> dict[str, list[str]]:
    dtype = next(iter(weights.values())).dtype
    units = units_of_sync(spec, 0, 1) if units is None else units
    growing = ExpectedChecksums(spec, dtype, ranks, units, device=device)
    for name, tensor in weights.items():
        growing.add(name, tensor)
    return growing.result()


# ---- the naive way: whole fused, padded copies of each rank ----


def padded_part(tensor: Tensor, dim: int, width: int, number: int) -> Tensor:
    size = tensor.shape[dim]
    part = tensor.narrow(dim, min(number * width, size), max(0, min(width, size - number * width)))
    missing = list(part.shape)
    missing[dim] = width - part.shape[dim]
    return torch.cat([part, part.new_zeros(missing)], dim)


def naive_rank(spec: ModelSpec, weights: dict[str, Tensor], ranks: int, rank: int, device: Device) -> dict[str, Tensor]:
    """Every tensor of one rank of a server, built as SGLang's loaders build them."""
    heads, kv_heads, head = spec.heads, spec.kv_heads, spec.head_dim
    ffn, expert_ffn, vocab = spec.ffn, spec.expert_ffn, -(-spec.vocab // 64) * 64
    kv_number = rank
    if device == "cpu":
        ffn, expert_ffn = (-(-size // (32 * ranks)) * 32 * ranks for size in (ffn, expert_ffn))
        if kv_heads % ranks:
            group = heads // kv_heads
            kv_heads = -(-kv_heads // ranks) * ranks
            heads = kv_heads * group
    elif kv_heads < ranks:
        kv_number = rank // (ranks // kv_heads)
        kv_heads = ranks
    q, kv = heads // ranks * head, kv_heads // ranks * head
    held = {"model.embed_tokens.weight": padded_part(weights["model.embed_tokens.weight"], 0, vocab // ranks, rank)}
    held["model.norm.weight"] = weights["model.norm.weight"]
    if not spec.tied:
        held["lm_head.weight"] = padded_part(weights["lm_head.weight"], 0, vocab // ranks, rank)
    for layer in range(spec.layers):
        at = f"model.layers.{layer}."
        own = {name.removeprefix(at): tensor for name, tensor in weights.items() if name.startswith(at)}
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            parts = [padded_part(own[f"self_attn.q_proj.{kind}"], 0, q, rank)]
            parts += [padded_part(own[f"self_attn.{name}_proj.{kind}"], 0, kv, kv_number) for name in "kv"]
            held[f"{at}self_attn.qkv_proj.{kind}"] = torch.cat(parts)
        held[f"{at}self_attn.o_proj.weight"] = padded_part(own["self_attn.o_proj.weight"], 1, q, rank)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if spec.qk_norm:
            norms += ["self_attn.q_norm", "self_attn.k_norm"]
        held |= {f"{at}{norm}.weight": own[f"{norm}.weight"] for norm in norms}
        if spec.experts:
            w13, w2 = [], []
            for expert in range(spec.experts):
                mlp = f"mlp.experts.{expert}."
                gate_up = [own[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")]
                w13.append(torch.cat([padded_part(part, 0, expert_ffn // ranks, rank) for part in gate_up]))
                w2.append(padded_part(own[f"{mlp}down_proj.weight"], 1, expert_ffn // ranks, rank))
            held[f"{at}mlp.gate.weight"] = own["mlp.gate.weight"]
            held[f"{at}mlp.experts.w13_weight"], held[f"{at}mlp.experts.w2_weight"] = torch.stack(w13), torch.stack(w2)
        else:
            gate_up = [own[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
            held[f"{at}mlp.gate_up_proj.weight"] = torch.cat([padded_part(p, 0, ffn // ranks, rank) for p in gate_up])
            held[f"{at}mlp.down_proj.weight"] = padded_part(own["mlp.down_proj.weight"], 1, ffn // ranks, rank)
    return held


def sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def word_hash(tensor: Tensor) -> str:
    """gpu_tensor_hash.py in numpy, line by line."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(data + bytes(-len(data) % 4), np.uint32)
    u32, seed = np.uint32, 0x243F6A88

    def fmix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> u32(16))) * u32(0x85EBCA6B)
        x = (x ^ (x >> u32(13))) * u32(0xC2B2AE35)
        return x ^ (x >> u32(16))

    total = 0
    for tile in range(0, len(words), 8192):
        at = np.arange(tile, min(tile + 8192, len(words)), dtype=np.uint32)
        seeds = (seed, ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
        halves = []
        for factor, lane_seed, turn in zip((0x27D4EB2D, 0x165667B1), seeds, (15, 13), strict=True):
            place = (at * u32(factor) + u32(lane_seed)) ^ ((at << u32(turn)) | (at >> u32(32 - turn)))
            summed = fmix(words[at] ^ place).sum(dtype=np.uint32)
            halves.append(int(fmix(np.array([summed ^ u32(len(words) * 4 & 0xFFFFFFFF)]))[0]))
        total += (halves[0] << 32) | halves[1]
    mask = (1 << 64) - 1
    total &= mask
    total = (total ^ (total >> 30)) * 0xBF58476D1CE4E5B9 & mask
    total = (total ^ (total >> 27)) * 0x94D049BB133111EB & mask
    return f"{total ^ (total >> 31):016x}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_gives_the_hash_of_every_fused_tensor(kind: str, ranks: int, device: Device) -> None:
    """At 4 ranks there are more ranks than key/value heads. Exact."""
    spec = spec_of(kind)
    weights = random_weights(spec, torch.bfloat16 if ranks == 2 else torch.float32)
    hashed = sha if device == "cpu" else word_hash
    held = [naive_rank(spec, weights, ranks, rank, device) for rank in range(ranks)]
    actual = [{name: hashed(tensor) for name, tensor in one.items()} for one in held]
    expected = expected_of(spec, weights, ranks, device=device)
    compare(expected, actual, "the naive server")
    assert len(expected) == len(actual[0])


@pytest.mark.parametrize("ranks", [3, 8])
def test_a_vocabulary_that_64_times_the_ranks_pads(ranks: int) -> None:
    (embedding,) = engine_tensors(spec_of("llama"), 0, ranks=ranks, device="cpu")
    assert embedding.sources[0].split.width * ranks == {3: 384, 8: 256}[ranks]  # 256 / 3 is not whole


@given(
    count=st.integers(1, 40_000),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    cuts=st.lists(st.integers(0, 40_000), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_the_word_hash_does_not_mind_how_bytes_are_cut(count: int, dtype: torch.dtype, cuts: list[int]) -> None:
    tensor = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    growing = checksums._WordHash(tensor.numel())
    for part in torch.tensor_split(tensor, sorted(cuts)):
        growing.update(part)
    assert checksums._hex(int(growing.digest())) == word_hash(tensor)


def test_small_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("qwen3moe")
    weights = random_weights(spec, torch.bfloat16)
    for device in ("cpu", "cuda"):
        whole = expected_of(spec, weights, 2, device=device)
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "CHUNK_BYTES", 1000)
            assert expected_of(spec, weights, 2, device=device) == whole


REAL_KERNEL = """
import importlib.util, sys, torch, triton
spec = importlib.util.spec_from_file_location("real", sys.argv[1])
real = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)
seed = 0x243F6A88
for data in torch.load(sys.argv[2]):
    words = data.view(torch.uint32)
    parts = torch.empty(triton.cdiv(words.numel(), 8192), dtype=torch.uint64)
    real.hash_tiles32_kernel_blocked[(len(parts),)](
        words, parts, words.numel(), seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=real.FMIX32_C1, FM_C2=real.FMIX32_C2, POS_A=real.POS_C1, POS_B=real.POS_C2,
        TILE=8192, BLOCK=256, USE_CG=True)
    while len(parts) > 1:
        fewer = torch.empty(triton.cdiv(len(parts), 1024), dtype=torch.uint64)
        real.add_tree_reduce_u64_kernel[(len(fewer),)](parts, fewer, len(parts), CHUNK=1024)
        parts = fewer
    print(f"{real._final_splitmix64(int(parts.item())):016x}")
"""


@pytest.mark.slow
def test_the_word_hash_is_sglangs_kernel(tmp_path: Path) -> None:
    """The kernel itself, run by Triton's interpreter: no GPU is needed."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None or importlib.util.find_spec("triton") is None:
        pytest.skip("neither SGLang nor Triton is installed here")
    kernel = Path(found.origin).parent / HASH_FILE
    data = [torch.randint(0, 256, (4 * words,), dtype=torch.uint8) for words in (1, 63, 8192, 8193, 30_000)]
    torch.save(data, tmp_path / "data.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    argv = [sys.executable, "-c", REAL_KERNEL, str(kernel), str(tmp_path / "data.pt")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    ours = []
    for one in data:
        growing = checksums._WordHash(one.numel())
        growing.update(one)
        ours.append(checksums._hex(int(growing.digest())))
    assert done.stdout.split() == ours


# ---- senders, units, differences ----


@pytest.mark.parametrize("kind", ["llama", "qwen3moe"])
def test_the_merge_of_stages_equals_the_whole(kind: str) -> None:
    spec = spec_of(kind, num_hidden_layers=4)
    weights = random_weights(spec)
    stages: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in weights.items():  # two stages of two chunks each: layers 0 and 2, layers 1 and 3
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else 1
        stages[layer % 2][name] = tensor
    assert merge(expected_of(spec, stage, 2) for stage in stages) == expected_of(spec, weights, 2)


def test_senders_that_disagree_are_told() -> None:
    with pytest.raises(RunError, match=r"sender 1 has other values of lm_head"):
        merge([{"lm_head.weight": ["0" * 16]}, {"lm_head.weight": ["1" * 16]}])


def test_half_a_fused_tensor_is_a_defect() -> None:
    spec = spec_of("llama")
    growing = ExpectedChecksums(spec, torch.float32, 1, units_of_sync(spec, 0, 1), device="cpu")
    weights = random_weights(spec)
    name = "model.layers.0.self_attn.q_proj.weight"
    growing.add(name, weights[name])
    with pytest.raises(AssertionError, match=r"only a part of .*qkv_proj"):
        growing.result()
    with pytest.raises(AssertionError, match=r"k_proj.weight is next"):
        growing.add(name, weights[name])


@given(layers=st.integers(1, 30), every=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_every_unit_is_checked_in_so_many_syncs(layers: int, every: int) -> None:
    spec = spec_of("llama", num_hidden_layers=layers)
    everything = frozenset(range(unit_count(spec)))
    assert units_of_sync(spec, 0, every) == units_of_sync(spec, every, every) == everything
    for first in range(every + 1):
        assert (
            frozenset().union(*(units_of_sync(spec, sync, every) for sync in range(first, first + every))) == everything
        )
    assert units_of_sync(spec, every, 0) == frozenset()


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_skip_patterns_leave_exactly_the_units(data: st.DataObject) -> None:
    spec = spec_of(data.draw(st.sampled_from(KINDS)), num_hidden_layers=data.draw(st.sampled_from([1, 12, 23])))
    held = {
        unit: {t.name for t in engine_tensors(spec, unit, ranks=2, device="cpu")} for unit in range(unit_count(spec))
    }
    units = data.draw(st.frozensets(st.sampled_from(sorted(held))))
    patterns = skip_patterns(spec, units)
    left = {name for names in held.values() for name in names if not any(pattern in name for pattern in patterns)}
    assert left == set().union(*(held[unit] for unit in units))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3moe"])
def test_one_flipped_bit_is_found_and_named(kind: str) -> None:
    spec = spec_of(kind)
    weights = random_weights(spec)
    actual: list[dict[str, str]] = [{}, {}]
    for name, digests in expected_of(spec, weights, 2).items():
        for rank in range(2):
            actual[rank][name] = digests[rank]
    compare(expected_of(spec, weights, 2), actual, "engine-0")
    for name, tensor in weights.items():
        tensor.view(-1).view(torch.int32)[-1] ^= 1
        with pytest.raises(RunError) as caught:
            compare(expected_of(spec, weights, 2), actual, "engine-0")
        message = str(caught.value)
        assert re.sub(r"(?<=experts\.)\d+", "*", name) in message
        assert message.endswith(f"1 of {len(actual[0])} tensors differ")
        tensor.view(-1).view(torch.int32)[-1] ^= 1


def test_what_is_missing_unexpected_or_of_too_few_ranks_is_named() -> None:
    expected = {"model.norm.weight": ["a", "a"], "model.layers.1.self_attn.qkv_proj.bias": ["b", "c"]}
    actual = [{name: digests[rank] for name, digests in expected.items()} for rank in range(2)]
    compare(expected, actual, "engine-3")
    with pytest.raises(RunError, match=r"engine-3 answered for 1 tensor-parallel ranks, not 2"):
        compare(expected, actual[:1], "engine-3")
    with pytest.raises(RunError, match=r"rank 1 .*qkv_proj.bias \(.*q_proj.bias.*v_proj.bias\) is missing; 1 of 2"):
        compare(expected, [actual[0], {"model.norm.weight": "a"}], "engine-3")
    with pytest.raises(RunError, match=r"rank 0 lm_head.weight .*is unexpected"):
        compare(expected, [{**actual[0], "lm_head.weight": "d"}, actual[1]], "engine-3")


def test_fused_names_are_taken_apart_for_messages() -> None:
    assert hf_names("model.layers.3.mlp.gate_up_proj.weight") == (
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    )
    assert hf_names("model.norm.weight") == ("model.norm.weight",)


# ---- real servers ----


def folder_stream(folder: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """The folder's tensors in the order of the export stream."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        for row in rows(spec):
            for name in row.hf:
                yield name, tensors.get_tensor(name)


def assert_server_holds(server: TinyServer, units: Sequence[int] | None = None, *, altered: str | None = None) -> None:
    spec = model_spec(json.loads((server.folder / "config.json").read_text()))
    wanted = frozenset(range(unit_count(spec)) if units is None else units)
    growing = ExpectedChecksums(spec, server.dtype, server.ranks, wanted, device="cpu")
    for name, tensor in folder_stream(server.folder, spec):
        growing.add(name, -tensor if name == altered else tensor)
    control = server.control()
    try:
        actual = control.checksums(skip_patterns(spec, wanted))
    finally:
        control.close()
    assert len(actual) == server.ranks
    compare(growing.result(), actual, server.url)


SERVERS = (
    ("llama", 1),  # tied
    ("llama", 2),
    ("qwen2", 1),  # biases, not tied
    ("qwen3", 1),  # norms of queries and keys
    ("qwen3", 2, torch.bfloat16),
    ("qwen3moe", 1),
    ("qwen3moe", 2),
)


@pytest.mark.slow
@pytest.mark.parametrize("tiny_server", SERVERS, indirect=True, ids=lambda key: f"{key[0]}-tp{key[1]}")
def test_a_real_server_says_what_is_expected(tiny_server: TinyServer) -> None:
    assert_server_holds(tiny_server)
    assert_server_holds(tiny_server, [2])  # layer 1 alone
    assert_server_holds(tiny_server, [0, 3])  # the ends
    with pytest.raises(RunError, match=r"rank 0 model.layers.1.self_attn.o_proj.weight .* 1 of \d+ tensors differ"):
        assert_server_holds(tiny_server, [2], altered="model.layers.1.self_attn.o_proj.weight")
