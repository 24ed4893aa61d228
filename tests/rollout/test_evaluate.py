"""An evaluation over real HTTP, its journal and budget: nothing is asked for twice, a cap keeps what is there."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import EvaluateConfig
from collab_megatron.config.sections import BudgetSection, EvaluationSection, JournalSection
from collab_megatron.data.parquet import read_tasks
from collab_megatron.evaluate import (
    Result,
    of_row,
    own_journal,
    own_name,
    play,
    play_rows,
    report,
    report_row,
    weights_name,
    with_paths,
)
from collab_megatron.launch.lock import run_lock
from collab_megatron.rollout.comparison import Cell, cells_of, table
from collab_megatron.rollout.evaluation import Evaluation
from collab_megatron.rollout.journal.store import Journal, ReplayMiss
from collab_megatron.rollout.judged_pairs import judge_cells
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.types import Future, Group, Reply, RolloutStatus
from tests.rollout.fakes import TASK, policy_turn
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


def compared(settings: EvaluateConfig, url: str, models: dict[str, Any], **compare: Any) -> EvaluateConfig:
    """The config with several models and two users."""
    llm = {"model": "hosted_vllm/user", "api_base": f"{url}/v1", "api_key_env": None}
    raw = settings.model_dump(exclude_unset=True)
    raw |= {"models": models, "compare": compare}
    raw["evaluation"] = {"users": {"other": {**llm, "temperature": 0.5}}}
    return EvaluateConfig.model_validate(raw)


async def test_models_side_by_side_have_one_table(tmp_path: Path, url: str) -> None:
    api = {"model": "hosted_vllm/user", "api_base": f"{url}/v1", "api_key_env": None}
    models = {"base": {}, "base+proactive": {"proactive": True}, "api": {"api": api}}
    settings = compared(evaluate_config(tmp_path, url), url, models, judged_pairs=2, resamples=50)
    results: dict[str, Result] = {}
    cells: list[Cell] = []
    for name in models:
        row = of_row(settings, name)
        with closing(own_journal(settings, weights_name(row, [url], name))) as journal:
            results[name] = await play(row, [url], MAX_CONTEXT_TOKENS, journal, row=name)
        cells += cells_of(name, results[name].played)
    assert [file.name for file in (tmp_path / "journal").glob("*.sqlite")] == ["run-models.sqlite"]
    for result in results.values():
        assert (result.played.done, list(result.played.others)) == (2 * HELD_OUT, ["other"])
        assert result.figures["users/other/conversations"] == HELD_OUT
    (system, *_), (plain, *_) = (results[name].played.groups[0].task.prompt for name in ("base+proactive", "base"))
    assert (system.role, plain.role) == ("system", "user")
    assert "Work together" in system.content
    generation = results["api"].played.groups[0].replies_G[0].generation
    assert generation.token_ids_T
    assert generation.logprobs_T == ()
    assert results["api"].figures["simulator/model-api/answers"] > 0

    with closing(own_journal(settings, "pairs")) as journal:
        cells = await judge_cells(settings, cells, "base", journal)
    made = table(cells, settings.reward.metric_weights, settings.compare, baseline="base", seed=1)
    assert [(row["model"], row["user"]) for row in made["rows"]] == [
        (model, user) for model in models for user in ("simulators.user", "other")
    ]
    for row in made["rows"]:
        assert row["conversations"] == HELD_OUT
        assert (row["difference"] == {}) == (row["wins"] is None) == (row["model"] == "base")
        if row["wins"] is not None:
            assert row["wins"]["won"] + row["wins"]["tied"] + row["wins"]["lost"] == 2
            assert row["wins"]["failed"] == 0
    before = asked(url)
    with closing(own_journal(settings, "pairs")) as journal:  # every verdict is in the journal
        assert [cell.wins for cell in await judge_cells(settings, cells, "base", journal)] == [
            cell.wins for cell in cells
        ]
    assert asked(url) == before


def test_rows_share_a_journal_and_its_cap_and_never_their_turns(tmp_path: Path) -> None:
    """As the command plays them, one after another: the first two have the same weights."""
    with stand_in(tmp_path, latency_ms=1) as url:
        api = {"model": "hosted_vllm/user", "api_base": f"{url}/v1", "api_key_env": None}
        models = {"base": {}, "base+proactive": {"proactive": True}, "api": {"api": api}}
        settings = compared(evaluate_config(tmp_path, url), url, models)
        one_at_a_time = settings.evaluation.model_copy(update={"max_concurrency": 1, "simulated_opening": True})
        engine = settings.engine.model_copy(update={"urls": (url,)})
        settings = settings.model_copy(update={"engine": engine, "evaluation": one_at_a_time})
        capped = settings.model_copy(update={"budget": BudgetSection(hard_calls=3)})
        contexts = {settings.model.path: MAX_CONTEXT_TOKENS}
        with run_lock(settings.run) as lock:
            (first,) = play_rows(capped, contexts, lock).values()
            assert "raise budget.hard_calls" in first.played.stop
            results = play_rows(settings, contexts, lock)
        assert [file.name for file in (tmp_path / "journal").glob("*.sqlite")] == ["run-models.sqlite"]
        assert asked(url)[2:] == [0, 0]
        begun = len(first.played.groups)
        assert said(results["base"])[:begun] == said(first)
        assert [replayed(result) for result in results.values()] == [begun, 0, 0]
        base, proactive, of_api = ([group.task.prompt[-1] for group in r.played.groups] for r in results.values())
        assert base == proactive == of_api  # one opening of each task by the user, paid for once

        for name, result in results.items():  # alone, with nothing to take from
            (tmp_path / name).mkdir()
            with closing(Journal(tmp_path / name / "alone.sqlite", replay="auto", lineage=name)) as journal:
                alone = asyncio.run(play(of_row(settings, name), [url], MAX_CONTEXT_TOKENS, journal, row=name))
            assert said(alone) == said(result)

        other = tmp_path / "other_model"
        shutil.copytree(settings.model.path, other)
        (other / "model.safetensors").write_bytes(b"other weights")
        moved = compared(evaluate_config(tmp_path, url), url, {"base": {}, "other": {"path": str(other)}})
        moved = moved.model_copy(update={"evaluation": one_at_a_time})
        row = of_row(moved, "other")
        with closing(own_journal(moved, weights_name(row, [], "other"))) as journal:
            result = asyncio.run(play(row, [url], MAX_CONTEXT_TOKENS, journal, row="other"))
        assert said(result) == said(results["base"])  # the server is the same
        assert replayed(result) == 0


def replayed(result: Result) -> int:
    """First turns that came from the journal, with the config's own user."""
    return sum(reply.generation.replayed for group in result.played.groups for reply in group.replies_G)


def test_a_row_has_the_paths_of_its_model_and_logs_of_its_own(tmp_path: Path) -> None:
    models = {"base": {}, "rl": {"path": "runs/x/checkpoints/rl"}, "gpt": {"api": {"model": "m", "api_key_env": None}}}
    settings = own_name(compared(evaluate_config(tmp_path, "http://127.0.0.1:1"), "http://127.0.0.1:1", models))
    assert settings.served == [settings.model.path, "runs/x/checkpoints/rl"]
    moved = with_paths(settings, {"runs/x/checkpoints/rl": tmp_path / "converted" / "rl"})
    assert of_row(moved, "rl").model.path == str(tmp_path / "converted" / "rl")
    assert of_row(moved, "base").model.path == of_row(moved, "gpt").model.path == settings.model.path
    assert of_row(moved, "rl").run.logs_dir == tmp_path / "logs" / "evaluate-run-rl"
    assert moved.served == [settings.model.path, str(tmp_path / "converted" / "rl")]
    alone = own_name(evaluate_config(tmp_path, "http://127.0.0.1:1"))
    assert of_row(alone, "") is alone


def test_the_report_of_several_models_lies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = evaluate_config(tmp_path, "http://127.0.0.1:1")
    settings = compared(given, "http://127.0.0.1:1", {"base": {}, "rl": {}}, resamples=50)
    settings = settings.model_copy(update={"output": tmp_path / "out" / "both.json"})
    future = Future(0, RolloutStatus.TERMINATED, (), {"accuracy": 1.0}, 1.0)
    group = Group(TASK, (), (Reply(policy_turn("a?"), (future,), mr=1.0),), kept=True)
    results = {}
    for name in ("base", "rl"):
        played = Evaluation({}, (group,), 2, others={"other": (group,)})
        results[name] = Result(played, {"accuracy": 1.0, "conversations": 1.0, "conversations_failed": 0.0})
    assert report(settings, settings, results, {"rl": 40}, judge=True) == ""
    names = {file.name for file in (tmp_path / "out").iterdir()}
    rows = {f"both-{name}{end}" for name in ("base", "rl") for end in (".json", ".jsonl", ".other.jsonl")}
    assert names == {*rows, "both.table.json", "both.table.md"}
    made = json.loads((tmp_path / "out" / "both.table.json").read_text())
    assert [row["figures"]["accuracy"]["mean"] for row in made["rows"]] == [1.0] * 4
    assert "| rl | other |" in (tmp_path / "out" / "both.table.md").read_text()
    assert "held-out conversations with rl" in capsys.readouterr().out
    (point,) = read_metrics(settings.run.tensorboard_dir / "rl")
    assert (point["step"], point["eval/accuracy"]) == (40, 1.0)


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
