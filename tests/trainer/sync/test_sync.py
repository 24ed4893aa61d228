"""Weights from trainer ranks to real SGLang servers: their greedy replies are those of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from collab_megatron.wire.roster import EngineEntry, RosterFolder
from tests.trainer.parallel.ranks import run_ranks
from tests.trainer.sync import sync_ranks
from tests.trainer.sync.conftest import TinyServer

SCRIPT = Path(sync_ranks.__file__)
PROBE_BOUND = {"float32": 2e-5, "bfloat16": 0.1}


@dataclass(frozen=True)
class Case:
    """One layout of the trainer against one server."""

    server: tuple[Any, ...]  # kind, tensor-parallel ranks, dtype
    parallel: dict[str, int]
    sync: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    full: bool = False  # only in `make test-full`: every pair of its options is in another case

    @property
    def ranks(self) -> int:
        sizes = {"tensor", "pipeline", "data"}
        product = 1
        for axis, size in self.parallel.items():
            product *= size if axis in sizes else 1
        return product

    def __str__(self) -> str:
        kind, tensor, *_ = self.server
        layout = "-".join(f"{axis[:2]}{size}" for axis, size in self.parallel.items()) or "one"
        how = "-".join(str(value) for value in (*self.sync.values(), *self.engine.values()))
        return f"{kind}-engine{tensor}-{layout}-{how}"


# small buckets: tens of them per sync, and tensors that are larger than a bucket
CASES = [
    Case(("llama", 1), {}, {"transport": "broadcast"}, full=True),
    Case(("llama", 1), {"tensor": 2}, {"transport": "broadcast", "pause": "retract"}),
    Case(("llama", 1), {"pipeline": 2}, {"transport": "ipc"}, {"placement": "colocated"}),
    Case(("llama", 1), {"tensor": 2}, {"transport": "disk"}),
    Case(("llama", 2), {"pipeline": 2}, {"transport": "broadcast"}),
    Case(("llama", 2), {"tensor": 2}, {"transport": "ipc"}, full=True),
    Case(("qwen2", 1), {"tensor": 2}, {"transport": "broadcast"}),
    Case(("qwen3", 1), {"pipeline": 2}, {"transport": "broadcast"}, full=True),
    Case(("qwen3", 2, torch.bfloat16), {}, {"transport": "broadcast"}),
    Case(("qwen3moe", 1), {"data": 2, "expert": 2}, {"transport": "broadcast"}),
    Case(("qwen3moe", 2), {"pipeline": 2}, {"transport": "ipc"}),
]


@pytest.mark.parametrize(
    ("tiny_server", "case"),
    [pytest.param(case.server, case, id=str(case), marks=[pytest.mark.full] if case.full else []) for case in CASES],
    indirect=["tiny_server"],
)
def test_the_engine_says_what_transformers_says(tiny_server: TinyServer, case: Case, tmp_path: Path) -> None:
    restore(tiny_server)
    entry = EngineEntry("engine-0", tiny_server.url, tiny_server.ranks, managed=False)
    RosterFolder(tmp_path / "roster").publish([entry], coming=0)
    dtype = str(tiny_server.dtype).removeprefix("torch.")
    job = {
        "model": str(tiny_server.folder),
        "dtype": dtype,
        "roster": str(tmp_path / "roster"),
        "out": str(tmp_path),
        "parallel": case.parallel,
        "sync": {"bucket_mb": 0.03, **case.sync},
        "engine": case.engine,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_ranks(SCRIPT, case.ranks, str(tmp_path / "job.json"))
    rows = json.loads((tmp_path / "replies.json").read_text())
    assert [row["version"] for row in rows] == list(sync_ranks.ASKED)
    for row in rows:
        assert row["served"] == str(row["version"])
        if dtype == "float32":  # bf16 rounds differently in transformers: the checksums and the probe have to do
            assert row["replies"] == greedy(tmp_path / f"v{row['version']}"), f"after sync {row['version']}"
        assert row["gap"] < PROBE_BOUND[dtype]
    assert rows[0]["checked"] > rows[-1]["checked"] > 0  # everything at first, a part later
    assert rows[0]["replies"] != rows[-1]["replies"], "the change of weights must show"


def restore(server: TinyServer) -> None:
    """Load the weights that the server was started with; other tests may have sent it others."""
    body = {"model_path": str(server.folder), "weight_version": "default", "flush_cache": True}
    httpx.post(f"{server.url}/continue_generation", json={}, timeout=60, trust_env=False)
    reply = httpx.post(f"{server.url}/update_weights_from_disk", json=body, timeout=60, trust_env=False)
    assert reply.json()["success"], reply.text


def greedy(folder: Path) -> list[list[int]]:
    """Transformers' greedy replies to sync_ranks.PROMPTS, one token at a time over the whole sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    replies = []
    with torch.no_grad():
        for prompt in sync_ranks.PROMPTS:
            ids = list(prompt)
            for _ in range(sync_ranks.NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            replies.append(ids[len(prompt) :])
    return replies
