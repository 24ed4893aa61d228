"""Agreement between ranks: an error on one rank is raised on all."""

from __future__ import annotations

from pathlib import Path

from tests.trainer.parallel.ranks import run_ranks


def test_an_error_is_raised_on_every_rank_by_its_class() -> None:
    run_ranks(Path(__file__).with_name("agreement_ranks.py"), 2, deadline_s=120)
