"""SFT and DPO under every kind of micro-batch and layout against plain PyTorch and transformers in fp64 (1e-5).

Loss, figures and gradient norm of three optimizer steps, and the weights after them. fp32 against fp64, so the
tolerance is that of fp32; test_dpo.py has the loss in fp64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.parallel.plain_supervised import write_reference
from tests.trainer.parallel.ranks import run_ranks
from tests.trainer.parallel.tiny import make_model

SCRIPT = Path(__file__).parent / "supervised_ranks.py"
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_tokens": 64, "share_prompts": False},
    "padded, smallest": {"micro_batch_tokens": 1, "share_prompts": False},
    "packed": {"micro_batch_tokens": 64, "packing": True, "share_prompts": False},
    "packed, all in one": {"micro_batch_tokens": 4096, "packing": True, "share_prompts": False},
    "shared prompts": {"micro_batch_tokens": 64},
}


def case(objective: str, way: str, parallel: dict[str, Any] | None = None, reference: str = "model") -> dict[str, Any]:
    return {"objective": objective, "train": WAYS[way], "parallel": parallel or {}, "reference": reference}


CASES = {
    1: [
        case(objective, way)
        for objective in ("sft", "dpo")
        for way in WAYS
        if way != "shared prompts" or objective == "dpo"
    ],
    2: [
        case("dpo", "packed", {"tensor": 2}),
        case("dpo", "shared prompts", {"tensor": 2, "sequence_parallel": True}, "swap"),
        case("dpo", "padded", {"pipeline": 2}),
        case("dpo", "shared prompts", {"pipeline": 2}, "swap"),
        case("dpo", "shared prompts", {"data": 2}),
        case("dpo", "padded, smallest", {"data": 2}, "swap"),
        case("sft", "packed", {"tensor": 2}),
        case("sft", "packed", {"pipeline": 2}),
        case("sft", "packed", {"data": 2}),
    ],
    4: [case("dpo", "packed", {"tensor": 2, "pipeline": 2}), case("dpo", "shared prompts", {"tensor": 2, "data": 2})],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("supervised") / "llama", "llama")
    write_reference(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", CASES)
def test_equals_plain_pytorch(work: Path, ranks: int) -> None:
    said = run_ranks(SCRIPT, ranks, str(work), json.dumps(CASES[ranks]))[0]
    print(said)
    assert said.count("'objective'") == len(CASES[ranks])
