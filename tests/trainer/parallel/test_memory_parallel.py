"""Planned bytes against those of real training steps: within 10 % for every part and for the sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.parallel.ranks import run_ranks
from tests.trainer.parallel.tiny import make_model

SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 512,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 512, "num_experts": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "cases"),
    [
        (
            "qwen3",
            (1, 1, 1, 1),
            ("float32,none", "bfloat16,full", "float32,selective", "bfloat16,none,packed,offload"),
        ),
        ("qwen3", (2, 1, 1, 1), ("bfloat16,selective",)),
        ("qwen2", (1, 1, 2, 1), ("bfloat16,none",)),
        ("qwen3moe", (1, 2, 1, 1), ("float32,none",)),
    ],
    ids=["alone", "tp2-sequence-parallel", "dp2-distributed", "pp2-experts"],
)
def test_the_formula_says_what_a_step_holds(
    tmp_path: Path, kind: str, layout: tuple[int, int, int, int], cases: tuple[str, ...]
) -> None:
    """`layout`: tensor, pipeline, data, expert."""
    make_model(tmp_path / kind, kind, **SIZES, **(EXPERTS if kind == "qwen3moe" else {}))
    tensor, pipeline, data, _ = layout
    arguments = [str(tmp_path), kind, *map(str, layout), *cases]
    for output in run_ranks(Path(__file__).with_name("memory_ranks.py"), tensor * pipeline * data, *arguments):
        print(output)
