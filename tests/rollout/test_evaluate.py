"""An evaluation over real HTTP, its journal and budget: nothing is asked for twice, a cap keeps what is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from collab_megatron.config import EvaluateConfig
from collab_megatron.config.sections import BudgetSection, EvaluationSection, JournalSection
from collab_megatron.data.parquet import read_tasks
from collab_megatron.evaluate import Result, own_journal, own_name, play, report_row
from collab_megatron.rollout.journal.store import Journal, ReplayMiss
from tests.rollout.runs import HELD_OUT, MAX_CONTEXT_TOKENS, config, counts, stand_in

pytestmark = pytest.mark.slow

CALLS = ("paid", "turns", "repeated", "turns_repeated")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with stand_in(tmp_path, latency_ms=150) as address:  # what was spent is read again every second
        yield address


def evaluate_config(folder: Path, url: str, **budget: int) -> EvaluateConfig:
    rl = config(folder, url)
    shared = ("run", "model", "data", "simulators", "reward", "rollout", "engine")
    return EvaluateConfig(
        **{name: getattr(rl, name) for name in shared},
        evaluation=EvaluationSection(max_concurrency=1),
        budget=BudgetSection.model_validate(budget),
    )


async def played(settings: EvaluateConfig, url: str, lineage: str, replay: str = "auto") -> Result:
    path = settings.run.dir / "evaluate.sqlite"
    with closing(Journal(path, replay=replay, lineage=lineage)) as journal:  # type: ignore[arg-type]
        return await play(settings, [url], MAX_CONTEXT_TOKENS, journal)


def asked(url: str) -> list[int]:
    return [counts(url)[name] for name in CALLS]


def said(result: Result) -> list[object]:
    """Without times."""
    replies = [(group.task.task_id, reply) for group in result.played.groups for reply in group.replies_G]
    return [
        (task_id, reply.text, reply.futures_K[0].messages, reply.futures_K[0].scores, reply.mr)
        for task_id, reply in replies
    ]


async def test_a_capped_evaluation_goes_on_and_asks_for_nothing_twice(tmp_path: Path, url: str) -> None:
    capped = await played(evaluate_config(tmp_path, url, hard_calls=3), url, "weights")
    begun = len(capped.played.groups)
    assert 0 < begun < capped.played.wanted == HELD_OUT
    assert "budget.hard_calls is 3: raise budget.hard_calls and start the evaluation again" in capped.played.stop
    assert capped.figures["conversations"] == begun
    assert capped.figures["budget/calls_to_date"] >= 3

    whole = await played(evaluate_config(tmp_path, url, hard_calls=1000), url, "weights")
    assert whole.played.stop == ""
    assert said(whole)[:begun] == said(capped)
    assert whole.figures["engine/turns_replayed"] > 0
    paid, turns, *repeated = asked(url)
    assert repeated == [0, 0]

    again = await played(evaluate_config(tmp_path, url), url, "weights", replay="only")
    assert said(again) == said(whole)
    assert asked(url) == [paid, turns, 0, 0]
    with pytest.raises(ReplayMiss):
        await played(evaluate_config(tmp_path, url), url, "other weights", replay="only")
    await played(evaluate_config(tmp_path, url), url, "other weights")
    assert asked(url)[1] == 2 * turns  # every turn was sampled again: those of other weights are not theirs


async def test_figures_and_conversations_lie_next_to_each_other(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = await played(evaluate_config(tmp_path, url), url, "weights")
    report_row("models/mine", result, tmp_path / "out" / "figures.json", ["accuracy", "interactivity"])
    said = capsys.readouterr().out
    assert "held-out conversations with models/mine" in said
    assert said.index("accuracy") < said.index("reward") < said.index("user calls") < said.index("figures.jsonl")
    assert len((tmp_path / "out" / "figures.jsonl").read_text().splitlines()) == HELD_OUT


async def test_the_simulated_user_opens_from_the_request_alone(tmp_path: Path, url: str) -> None:
    settings = evaluate_config(tmp_path, url)
    opens = settings.model_copy(update={"evaluation": EvaluationSection(num_tasks=2, simulated_opening=True)})
    result = await played(opens, url, "weights")
    assert len(result.played.groups) == 2
    given = {task.task_id: task for task in read_tasks(tmp_path / "data" / "validation.parquet")}
    for group in result.played.groups:
        (opening,) = group.task.prompt
        assert opening.role == "user"
        assert opening.content not in ("", given[group.task.task_id].prompt[-1].content)
    assert result.figures["conversations_failed"] == 0


def test_every_set_of_weights_has_a_journal_and_a_cap_of_its_own(tmp_path: Path) -> None:
    taken = own_name(evaluate_config(tmp_path, "http://127.0.0.1:1"))
    with closing(own_journal(taken, "1a")), closing(own_journal(taken, "2b")):
        made = sorted(file.name for file in (tmp_path / "journal").glob("*.sqlite"))
    assert made == ["evaluate-run-1a.sqlite", "evaluate-run-2b.sqlite"]
    # an RL config that names its journal: never that file
    named = taken.model_copy(update={"journal": JournalSection(path=tmp_path / "local" / "rl.sqlite")})
    with closing(own_journal(named, "1a")):
        assert [file.name for file in (tmp_path / "local").glob("*.sqlite")] == ["evaluate-run-1a.sqlite"]


def test_an_evaluation_never_has_the_name_of_the_run_whose_config_it_took(tmp_path: Path) -> None:
    taken = evaluate_config(tmp_path, "http://127.0.0.1:1")
    assert own_name(taken).run.name == "evaluate-run"
    assert own_name(own_name(taken)).run.logs_dir == tmp_path / "logs" / "evaluate-run"
