"""The layouts that must all give the same numbers, by the number of processes that they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One model under one layout, cut into micro-batches in one way."""

    kind: str  # of tests/trainer/parallel/tiny.py; all with four layers
    parallel: dict[str, Any]  # ParallelSection
    rows: int = 4  # samples of a micro-batch
    packed: bool = False
    share: bool = False  # packed, prompts computed once
    optimizer: dict[str, Any] | None = None  # changes of plain.OPTIMIZER
    recompute: str = "none"
    logits_chunk_bytes: int = 2**29
    loss: str = "grpo"  # of plain.ALGORITHMS
    full: bool = False  # only in `make test-full`: every pair of its options is in another case

    @property
    def name(self) -> str:
        parts = [self.kind, *(f"{key}{value}" for key, value in self.parallel.items())]
        parts += [f"rows{self.rows}", "shared" if self.share else "packed" if self.packed else "padded"]
        parts += [key for key, value in (self.optimizer or {}).items() if value]
        if self.recompute != "none":
            parts.append(f"recompute-{self.recompute}")
        if self.logits_chunk_bytes < 2**29:
            parts.append("chunked-head")
        if self.loss != "grpo":
            parts.append(self.loss)
        return "-".join(parts)


TP2, SP2 = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}
PP2, PP2X2, DP2 = {"pipeline": 2}, {"pipeline": 2, "interleave": 2}, {"data": 2}
SHARDED = {"distributed": True}
SMALL = 16 * 250 * 4  # bytes: 16 tokens of the tiny vocabulary at a time

ONE = [
    *(Case("llama", {}, rows, packed, full=packed != (rows == 2)) for rows in (1, 2, 4) for packed in (False, True)),
    Case("qwen2", {}, packed=True, logits_chunk_bytes=SMALL),
    Case("qwen2", {}, recompute="full", full=True),
    Case("qwen3", {}, packed=True, recompute="selective"),
    Case("qwen3", {}, optimizer=SHARDED, full=True),
    Case("mistral", {}, packed=True),
    Case("llama3", {}),
    Case("llama", {}, 8, share=True),
    Case("qwen3", {}, 3, share=True, recompute="full"),
    Case("mistral", {}, 8, share=True),  # the window ends inside the prompt
    Case("qwen3moe", {}, 8, share=True),
    Case("qwen3moe", {}, full=True),
    Case("qwen3moe", {}, packed=True, recompute="selective"),
    Case("llama", {}, 2, loss="sequence"),
    Case("llama", {}, 8, share=True, loss="sequence", logits_chunk_bytes=SMALL),
]
TWO = [
    *(
        Case("llama", layout, 2, packed, full=packed != (layout in (TP2, PP2)))
        for layout in (TP2, SP2, PP2, DP2)
        for packed in (False, True)
    ),
    *(Case("qwen2", PP2, rows, packed, full=packed != (rows == 1)) for rows in (1, 4) for packed in (False, True)),
    Case("qwen2", SP2, logits_chunk_bytes=SMALL),
    Case("qwen3", PP2X2, 2),
    Case("qwen3", PP2X2, 1, packed=True, recompute="full"),
    Case("llama", PP2X2, 2),  # tied across the first and the last chunk
    Case("qwen3", DP2, optimizer=SHARDED, full=True),
    Case("qwen3", DP2, 1, packed=True, optimizer=SHARDED),
    Case("mistral", SP2, packed=True, recompute="full"),
    Case("llama3", PP2),
    Case("llama", SP2, 8, share=True),
    Case("qwen2", PP2, share=True),
    Case("qwen3", DP2, 8, share=True, optimizer=SHARDED),
    Case("qwen3moe", {"data": 2, "expert": 2}, 2),
    Case("qwen3moe", {"data": 2, "expert": 2}, 2, packed=True, optimizer=SHARDED),
    Case("qwen3moe", DP2, full=True),
    Case("qwen3moe", PP2, packed=True),
    Case("qwen3moe", SP2 | {"expert": 2}),
    Case("qwen3moe", SP2, packed=True),
    Case("qwen2", TP2, 3, loss="sequence"),
    Case("qwen2", SP2, packed=True, loss="sequence"),
    Case("llama", PP2, 2, packed=True, loss="sequence"),  # tied: the entropy's gradient reaches the embedding too
    Case("llama", PP2X2, 2, loss="sequence", full=True),
    Case("llama", DP2, 3, share=True, loss="sequence"),
]
FOUR = [
    Case("llama", SP2 | PP2, 2),
    Case("qwen2", TP2 | DP2, packed=True, optimizer=SHARDED),
    Case("qwen3", PP2X2 | DP2, 1, optimizer=SHARDED),
    Case("qwen3moe", PP2 | {"data": 2, "expert": 2}, 2, packed=True),
    Case("qwen3moe", SP2 | {"data": 2, "expert": 2}, 2, optimizer=SHARDED),
    Case("qwen3moe", SP2 | {"data": 2, "expert": 4}, 2),
    Case("qwen2", PP2 | DP2, 2, packed=True, loss="sequence"),
]
CASES = {1: ONE, 2: TWO, 4: FOUR}
