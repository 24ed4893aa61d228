"""Every layout against the policy step in plain PyTorch and transformers (fp32, relative 1e-5).

Log-probs, entropies, loss, metrics, gradient norm of three optimizer steps, and the weights after them. One set of
processes runs all cases of its size; each case is a test of its own that reads what came of it.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.parallel.layouts import CASES, Case
from tests.trainer.parallel.plain import write_reference
from tests.trainer.parallel.ranks import RanksFailed, run_ranks
from tests.trainer.parallel.tiny import KINDS, make_model

SCRIPT = Path(__file__).parent / "layout_ranks.py"
ALL = [
    pytest.param(n, case, id=f"{n}-{case.name}", marks=[pytest.mark.full] if case.full else [])
    for n, cases in CASES.items()
    for case in cases
]


class Outcomes:
    """What came of every selected case, by number of processes; each number is run once, when its first test asks."""

    def __init__(self, work: Path, selected: set[str]) -> None:
        self._work, self._selected = work, selected
        self.of = functools.cache(self._run)

    def _run(self, processes: int) -> tuple[dict[str, Any], str]:
        """Outcome by case name, and the failing ranks' output."""
        names = [case.name for case in CASES[processes] if case.name in self._selected]
        if processes > 1:
            failure = self._failure_of(processes, names)
        else:  # cases of one process: half of them on each core
            with ThreadPoolExecutor() as pool:
                failure = "".join(pool.map(self._failure_of, (1, 1), (names[::2], names[1::2])))
        path = self._work / f"outcomes-{processes}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {row["case"]: row for row in map(json.loads, lines)}, failure

    def _failure_of(self, processes: int, names: list[str]) -> str:
        try:
            run_ranks(SCRIPT, processes, str(self._work), *names, deadline_s=280)
        except RanksFailed as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcomes:
    work = tmp_path_factory.mktemp("layouts")
    for kind in KINDS:
        make_model(work / kind, kind, num_hidden_layers=4)
        for loss in {case.loss for cases in CASES.values() for case in cases if case.kind == kind}:
            write_reference(work / kind, loss)
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return Outcomes(work, {call["case"].name for call in calls if isinstance(call.get("case"), Case)})


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "case"), ALL)
def test_equals_plain_pytorch(outcomes: Outcomes, processes: int, case: Case) -> None:
    found, failure = outcomes.of(processes)
    assert case.name in found, f"{case.name} failed, or a case before it did:\n{failure}"
    assert found[case.name]["weights"] < 1e-5
