"""The actor on real gloo ranks against plain PyTorch and transformers, for every layout that this machine can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.ranks import RanksFailed, run_ranks
from tests.parallel.tiny import KINDS, make_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        make_model(work / kind, kind)
        make_model(work / f"{kind}-bf16", kind, dtype=torch.bfloat16)
    return work


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "data", "sequence_parallel", "distributed"),
    [(1, 1, 0, 0), (2, 1, 0, 0), (2, 1, 1, 0), (1, 2, 0, 0), (2, 2, 0, 1)],
    ids=["tp1", "tp2", "tp2-sequence-parallel", "dp2", "tp2-dp2-distributed-optimizer"],
)
def test_equals_plain_pytorch(models: Path, tensor: int, data: int, sequence_parallel: int, distributed: int) -> None:
    """fp32, 1e-5: log-probs, entropies, export (exact), loss, gradient norm and weights after three steps."""
    args = [str(x) for x in (models, tensor, data, sequence_parallel, distributed)]
    run_ranks(HERE / "actor_ranks.py", tensor * data, *args)


@pytest.mark.slow
def test_world_size_must_fit_the_layout(models: Path) -> None:
    with pytest.raises(RanksFailed, match=r"1 ranks were started, but parallel\.tensor=2 times parallel\.data=1 is 2"):
        run_ranks(HERE / "actor_ranks.py", 1, str(models), "2", "1", "0", "0")


@pytest.mark.slow
def test_a_lost_peer_is_reported_with_rank_and_phase(models: Path) -> None:
    run_ranks(HERE / "lost_peer_ranks.py", 2, str(models / "llama"))
