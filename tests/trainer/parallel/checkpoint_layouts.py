"""Layouts of checkpoint_ranks.py: those to save under, and those to load under."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Layout:
    """One way to lie on one or two ranks."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)  # ParallelSection
    distributed: bool = False
    cpu_offload: float = 0.0


ONE, TP2, PP2 = Layout("one"), Layout("tp2", {"tensor": 2}), Layout("pp2", {"pipeline": 2})
SP2 = Layout("tp2-sequence", {"tensor": 2, "sequence_parallel": True})
PP2X2 = Layout("pp2x2", {"pipeline": 2, "interleave": 2})
DP2 = Layout("dp2-distributed", {"data": 2}, distributed=True)
HOST = Layout("one-offload", cpu_offload=0.5)
EP2 = Layout("ep2", {"data": 2, "expert": 2})
EP2D = Layout("ep2-distributed", {"data": 2, "expert": 2}, distributed=True)

# (model folder, layouts, whether each takes over every other's)
FAMILIES = (
    ("qwen3", (ONE, TP2, PP2, PP2X2, DP2, HOST), True),
    ("qwen3moe", (ONE, SP2, PP2, EP2, EP2D), True),
    ("qwen3-bf16", (ONE, TP2, PP2X2, DP2, HOST), False),
    ("qwen3moe-bf16", (EP2D,), False),
)
# largest relative differences of the next steps under another layout
BOUNDS = {
    torch.float32: {"loss": 1e-5, "norm": 1e-5, "weights": 1e-6},
    torch.bfloat16: {"loss": 5e-3, "norm": 1e-2, "weights": 5e-3},
}
# one after the other on the same processes
SAVES = [(kind, layout) for kind, layouts, _ in FAMILIES for layout in layouts]
TAKE_OVERS = [(kind, layouts, layout) for kind, layouts, crosses in FAMILIES if crosses for layout in layouts]
# from one kind of optimizer to the other, whose master weights have other names
BF16_TAKE_OVERS = [("qwen3-bf16", (ONE, PP2X2, DP2), TP2), ("qwen3-bf16", (TP2,), DP2)]
