"""Agreement between ranks: an error on one rank is raised on all."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.errors import EvaluationFailed, Interrupted, NoEngineLeft, RunError, WeightsDiffer
from collab_megatron.trainer.actor.agreement import RankFailure
from collab_megatron.trainer.sync.servers import EnginesLost
from collab_megatron.wire.protocol import WHY_STOP
from tests.trainer.parallel.ranks import run_ranks


@pytest.mark.slow
def test_an_error_is_raised_on_every_rank_by_its_class() -> None:
    run_ranks(Path(__file__).with_name("agreement_ranks.py"), 2, deadline_s=120)


@pytest.mark.parametrize(
    "kind", [*WHY_STOP.values(), Interrupted, EvaluationFailed, NoEngineLeft, WeightsDiffer, EnginesLost]
)
def test_an_error_that_callers_react_to_crosses_as_its_class(kind: type[RunError]) -> None:
    assert RankFailure.of(kind("why")) == RankFailure(kind, "why")
