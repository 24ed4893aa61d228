"""The cases of test_ranks.py: what is checked, of which model, under which layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

OUTCOMES = "outcomes.jsonl"


@dataclass(frozen=True)
class Case:
    """One check of gpu_ranks.py."""

    name: str
    what: Literal["layout", "checkpoint", "swap"] = "layout"
    kind: str = "qwen3"  # of tests/trainer/parallel/tiny.py; all with four layers
    parallel: dict[str, Any] = field(default_factory=dict)  # ParallelSection
    optimizer: dict[str, Any] = field(default_factory=dict)  # changes of plain.OPTIMIZER
    packed: bool = False
    share: bool = False  # packed, prompts computed once
    recompute: Literal["none", "selective", "full"] = "none"
    chunked: bool = False  # the head in small chunks
    loss: str = "grpo"  # of plain.ALGORITHMS

    @property
    def ranks(self) -> int:
        return math.prod(self.parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context", "data"))


DISTRIBUTED, OFFLOAD = {"distributed": True}, {"cpu_offload": 1.0}

_ALL = [
    Case("layout-padded"),
    Case("layout-packed", packed=True),
    Case("layout-share_prompts", kind="llama", share=True),
    Case("layout-qkv-bias", kind="qwen2", packed=True),
    Case("layout-window", kind="mistral", packed=True),
    Case("layout-rope-scaling", kind="llama3"),
    Case("layout-recompute-full", packed=True, recompute="full"),
    Case("layout-recompute-selective", recompute="selective"),
    Case("layout-chunked-head", packed=True, chunked=True),
    Case("layout-whole-replies", packed=True, loss="sequence"),
    Case("layout-distributed", optimizer=DISTRIBUTED),
    Case("layout-offload", optimizer=OFFLOAD),
    Case("layout-offload-distributed", optimizer={"cpu_offload": 0.5, "distributed": True}),
    Case("state-dense", "checkpoint"),
    Case("state-dense-distributed", "checkpoint", optimizer=DISTRIBUTED),
    Case("state-dense-offload", "checkpoint", optimizer=OFFLOAD),
    # with transformer-engine an expert's extra state has a name of its own, which a load must not ask for
    Case("state-moe", "checkpoint", "qwen3moe"),
    Case("state-moe-distributed", "checkpoint", "qwen3moe", optimizer=DISTRIBUTED),
    Case("state-swap", "swap", packed=True),
    Case("state-swap-distributed", "swap", packed=True, optimizer=DISTRIBUTED),
    Case("two-tensor", parallel={"tensor": 2}),
    Case("two-sequence", parallel={"tensor": 2, "sequence_parallel": True}, packed=True),
    Case("two-pipeline", parallel={"pipeline": 2}, packed=True),
    Case("two-interleaved", parallel={"pipeline": 2, "interleave": 2}),
    Case("two-data", parallel={"data": 2}, packed=True),
    Case("two-data-distributed", parallel={"data": 2}, optimizer=DISTRIBUTED),
    Case("two-context", parallel={"context": 2}),  # packing does not work with it yet
    Case("two-context-whole-replies", parallel={"context": 2}, loss="sequence"),
    Case("two-experts", "checkpoint", "qwen3moe", parallel={"data": 2, "expert": 2}),
    Case("two-pipeline-saved", "checkpoint", parallel={"pipeline": 2}),
]
CASES = {case.name: case for case in _ALL}
