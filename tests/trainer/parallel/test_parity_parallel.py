"""Every architecture under every layout of two processes, and some of four, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from collab_megatron.launch.ports import free_port
from tests.trainer.parallel.ranks import run_ranks
from tests.trainer.parallel.tiny import KINDS, make_model, make_samples

HERE = Path(__file__).parent
DENSE = [kind for kind in KINDS if kind != "qwen3moe"]
# name -> kind and keys of its config
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-query": (
        "llama",
        {"num_key_value_heads": 1, "head_dim": 24, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    "multi-head": ("qwen2", {"num_key_value_heads": 4, "num_attention_heads": 4}),
    "unnormalised-experts": ("qwen3moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
}
Layouts = list[tuple[str, list[str], dict[str, Any]]]
# four layers: two chunks on each of two stages; a mixture of experts takes tensor parallelism with sequence parallelism
OF_TWO: Layouts = [
    ("tp2", [*DENSE, "multi-head"], {"tensor": 2}),
    ("tp2-sequence-parallel", ["qwen3moe"], {"tensor": 2, "sequence_parallel": True}),
    ("pp2", [*KINDS, "multi-query"], {"pipeline": 2}),
    ("pp2-interleave2", list(KINDS), {"pipeline": 2, "interleave": 2}),
    ("ep2-dp2", ["qwen3moe", "unnormalised-experts"], {"expert": 2, "data": 2}),
    ("tp2-ep2-sequence-parallel", ["qwen3moe"], {"tensor": 2, "expert": 2, "sequence_parallel": True}),
]
# what gathers inside a stage and sends between stages; a second replica, whose stages send nothing
OF_FOUR: Layouts = [
    ("tp2-pp2-sequence-parallel", ["llama", "qwen3moe"], {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    ("pp2-interleave2-dp2", ["qwen3"], {"pipeline": 2, "interleave": 2, "data": 2}),
    ("pp2-ep2-dp2", ["qwen3moe"], {"pipeline": 2, "expert": 2, "data": 2}),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    for name, (kind, changes) in ({kind: (kind, {}) for kind in KINDS} | VARIANTS).items():
        for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16)):
            make_model(folder / (name + suffix), kind, dtype=dtype, num_hidden_layers=4, **changes)
            (folder / (name + suffix) / "tokenizer_config.json").write_text('{"stands": "for its config"}')
        torch.save(reference(folder / name), folder / f"{name}.pt")
    return folder


@torch.no_grad()
def reference(folder: Path) -> dict[str, list[Any]]:
    """Ids, log-probs and entropies [T] of every sample, each alone in its batch; zero at the first token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    samples = make_samples(7)
    found: dict[str, list[Any]] = {"ids": [sample.ids for sample in samples], "logprobs": [], "entropies": []}
    for sample in samples:
        ids = torch.tensor(sample.ids)
        logits = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
        chosen, entropy = logits.gather(-1, ids[1:, None])[:, 0], -(logits.exp() * logits).sum(-1)
        found["logprobs"].append(torch.nn.functional.pad(chosen, (1, 0)))
        found["entropies"].append(torch.nn.functional.pad(entropy, (1, 0)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layouts"), [(2, OF_TWO), (4, OF_FOUR)], ids=["two-ranks", "four-ranks"])
def test_log_probs_and_round_trips_under_every_layout(work: Path, ranks: int, layouts: Layouts) -> None:
    """Log-probs and entropies to 1e-5 in fp32; every tensor and companion file exact, in fp32 and bf16."""
    keys = ("name", "kinds", "parallel", "port")
    given = [dict(zip(keys, (*layout, free_port()), strict=True)) for layout in layouts]
    print(run_ranks(HERE / "parity_ranks.py", ranks, str(work), json.dumps(given))[0])
