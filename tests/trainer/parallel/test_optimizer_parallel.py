"""CPU offload, overlapped communication and recomputation on two real ranks: same numbers as the plain step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.parallel.ranks import run_ranks
from tests.trainer.parallel.tiny import make_model


@pytest.mark.slow
def test_offload_overlap_and_recompute_change_nothing(tmp_path: Path) -> None:
    """fp32 and bf16, with and without the distributed optimizer, through checkpoints: exact."""
    make_model(tmp_path / "qwen3", "qwen3")
    run_ranks(Path(__file__).with_name("optimizer_ranks.py"), 2, str(tmp_path))
