"""Trainer ranks on GPUs: layouts against transformers, checkpoints, distributed optimizer, offload, swapped reference.

Cases of one number of ranks run in the same processes, because a start costs more than a case. One that fails ends
them; the cases behind it get processes of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from collab_megatron.launch.run_processes import ONE_QUEUE
from tests.gpu import gpu_ranks
from tests.gpu.cases import CASES, OUTCOMES, Case
from tests.gpu.device import DEVICE, ON_DEVICE, PART_S, has_transformer_engine
from tests.trainer.parallel.ranks import RanksFailed, run_ranks
from tests.trainer.parallel.tiny import make_model

pytestmark = ON_DEVICE

ALL_S = min(200.0, PART_S - 30.0)  # of all cases of one number of ranks; the rest is for pytest


def why_not(case: Case) -> str | None:
    """The reason why a case cannot run here; None if it can."""
    if DEVICE == "cuda" and torch.cuda.device_count() < case.ranks:
        return f"needs {case.ranks} GPUs, {torch.cuda.device_count()} are visible"
    if case.parallel.get("context", 1) > 1 and not has_transformer_engine():
        return "context parallelism needs transformer-engine, which is not installed"
    if case.share and has_transformer_engine():
        return "transformer-engine's attention cannot share prompts; trainer/rank_batch.py does not ask it to"
    return None


class Outcomes:
    """The error of each selected case, "" if it went well; run when first asked for."""

    def __init__(self, folder: Path, selected: Sequence[Case]) -> None:
        self._folder, self._selected = folder, selected
        self._by_ranks: dict[int, Mapping[str, str]] = {}

    def __getitem__(self, case: Case) -> str:
        if case.ranks not in self._by_ranks:
            work = self._folder / f"ranks-{case.ranks}"
            work.mkdir()
            alike = [other for other in self._selected if other.ranks == case.ranks and why_not(other) is None]
            self._by_ranks[case.ranks] = run_cases(work, alike, case.ranks)
        return self._by_ranks[case.ranks][case.name]


def run_cases(work: Path, cases: Sequence[Case], ranks: int) -> dict[str, str]:
    """Name of each case -> its error, "" if it went well."""
    for kind in {case.kind for case in cases}:
        make_model(work / kind, kind, torch.bfloat16, num_hidden_layers=4)
    end = time.monotonic() + ALL_S
    errors: dict[str, str] = {}
    while rest := [case.name for case in cases if case.name not in errors]:
        left = end - time.monotonic()
        if left <= 0:
            return {**errors, **dict.fromkeys(rest, f"not run: the cases before it took {ALL_S:g} s")}
        error = ""
        with pytest.MonkeyPatch.context() as environment:
            if ranks > 1:
                environment.setenv(ONE_QUEUE, "1")  # as the launcher does
            try:
                run_ranks(Path(gpu_ranks.__file__), ranks, str(work), DEVICE, *rest, deadline_s=left)
            except RanksFailed as failure:
                error = str(failure)
        outcomes = work / OUTCOMES
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        errors |= {json.loads(line)["case"]: "" for line in lines}
        if error:
            behind = [name for name in rest if name not in errors]
            errors[behind[0] if behind else rest[-1]] = error  # the end of the ranks belongs to the last case
    return errors


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcomes:
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    chosen = {item.callspec.params["name"] for item in items}
    return Outcomes(tmp_path_factory.mktemp("ranks"), [case for case in CASES.values() if case.name in chosen])


@pytest.mark.parametrize("name", CASES)
def test_ranks(outcomes: Outcomes, name: str) -> None:
    case = CASES[name]
    if reason := why_not(case):
        pytest.skip(reason)
    error = outcomes[case]
    assert not error, error
