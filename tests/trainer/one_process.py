"""A small model's description and the grid of one data rank, without process groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from collab_megatron.model.spec import model_spec
from collab_megatron.trainer.actor.grid import RankGrid

SPEC = model_spec(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 250,
    }
)


def grid_of(dp_rank: int = 0, dp_size: int = 1, *, cp_size: int = 1, device: str = "cpu") -> RankGrid:
    """What the step code reads of a grid."""
    return cast(
        Any,
        SimpleNamespace(
            dp_rank=dp_rank,
            dp_size=dp_size,
            cp_size=cp_size,
            world_size=1,
            is_main=True,
            pad_multiple=1,
            backend=SimpleNamespace(name=device),
            sum_over_context=lambda sums: sums,
        ),
    )
