"""The actor on real gloo ranks, beyond the numbers of test_layouts.py: skipped steps, references, lost peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.parallel.ranks import RanksFailed, run_ranks
from tests.trainer.parallel.tiny import make_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("models")
    for kind in ("llama", "qwen3"):
        make_model(work / kind, kind)
    return work


@pytest.mark.slow
def test_skipped_steps_bf16_and_references_on_four_ranks(models: Path) -> None:
    run_ranks(HERE / "actor_ranks.py", 4, str(models))


@pytest.mark.slow
def test_world_size_must_fit_the_layout(models: Path) -> None:
    message = r"1 ranks were started, but parallel\.tensor=2 \* pipeline=2 \* context=1 \* data=1 is 4"
    with pytest.raises(RanksFailed, match=message):
        run_ranks(HERE / "actor_ranks.py", 1, str(models))


@pytest.mark.slow
def test_a_lost_peer_is_reported_with_rank_and_phase(models: Path) -> None:
    run_ranks(HERE / "lost_peer_ranks.py", 2, str(models / "llama"))
