"""The viewer's data: what a row and a tree of the page hold, which trees are read, and what is refused."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from collab_megatron.errors import UserError
from collab_megatron.view.__main__ import parse_steps, read_payload
from collab_megatron.view.compact import compact_tree
from collab_megatron.view.payload import Payload
from collab_megatron.view.rows import row_of_tree
from collab_megatron.view.sources import find_sources
from collab_megatron.view.token_words import find_tokenizer, token_words
from tests.view.records import a_call, a_future, a_reply, a_tree, write_record


def payload_of(*runs: Path, steps: tuple[int, ...] = (), max_trees: int = 100) -> Payload:
    return read_payload(list(runs), steps, max_trees=max_trees, tokenizer=None)


def unpacked(packed: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def column(payload: Payload, name: str) -> list[Any]:
    values: list[Any] = json.loads(payload.index)["columns"][name]
    return values


def test_a_row_has_the_figures_of_its_tree() -> None:
    row = row_of_tree(a_tree())
    assert (row["mr"], row["best"], row["spread"], row["advantage"]) == (0.65, 0.9, 0.5, 1.5)
    assert row["asked"] == 0.5  # one of two replies
    assert row["metrics"] == {"accuracy": 1.0}
    assert (row["usd"], row["seconds"], row["tokens"], row["versions"]) == (1.0, 1.0, 6, [10, 11])
    assert row["title"] == "I need a table."


def test_what_is_missing_is_no_zero() -> None:
    failed = a_future(status="judge_failed", scores={}, reward=None, calls=[])
    row = row_of_tree(a_tree(replies=[a_reply(mr=None, advantage=None, futures=[failed])], trained=None))
    assert [row[name] for name in ("mr", "best", "spread", "advantage", "usd", "trained")] == [None] * 6
    assert row["failures"] == {"judge_failed": 1}
    assert row["metrics"] == {}
    assert row_of_tree(a_tree(replies=[], error="engine is gone"))["failures"] == {"no_replies": 1}


def test_a_tree_keeps_thoughts_reasons_times_and_versions() -> None:
    tree = compact_tree(a_tree())
    reply = tree["r"][0]
    assert (reply["th"], reply["lp"], reply["vr"], reply["t"]) == (
        "no day yet",
        [-0.21, -0.04, -0.001],
        [[10, 1], [11, 2]],
        [0, 400],
    )
    user, judge = reply["f"][0]["c"]
    assert (user["th"], user["t"], user["usd"]) == ("it asks for the day", [500, 1000], 0.25)
    assert (judge["me"], judge["mk"]) == ("interactivity", {"understanding": 1})
    assert reply["f"][0]["d"] == {"accuracy": {"decided_by": "rule"}}


def test_values_of_a_wrong_type_are_left_out() -> None:
    wild = a_tree(
        task_id=7,
        prompt="no list",
        replies=[
            a_reply(token_ids="x", logprobs=None, mr=float("nan"), version_runs=[None, [1]], futures=[3, a_future()])
        ],
    )
    wild["replies"][0]["futures"][1]["calls"] = [a_call(cost_usd=float("inf"), marks=[1]), "no call"]
    wild["replies"][0]["futures"][1]["details"] = {"accuracy": {"big": 10**40, "nan": float("nan"), "deep": deep(5000)}}
    tree = compact_tree(wild)
    json.dumps(tree, allow_nan=False)
    assert (tree["id"], tree["p"], tree["r"][0]["ids"], tree["r"][0]["mr"]) == ("", [], [], None)
    (future,) = tree["r"][0]["f"]
    assert future["c"][0]["usd"] is None
    assert future["d"]["accuracy"]["big"] == str(10**40)
    assert row_of_tree(wild)["usd"] is None


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def test_blocks_hold_the_trees_that_the_index_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collab_megatron.view.payload.BLOCK_BYTES", 4000)
    trees = [a_tree(step=step, task_id=f"task {step}") for step in range(1, 10)]
    payload = payload_of(write_record(tmp_path / "run", *trees))
    assert 1 < len(payload.blocks) < len(trees)
    for row, (block, place) in enumerate(zip(column(payload, "block"), column(payload, "at"), strict=True)):
        assert unpacked(payload.blocks[block])[place]["id"] == f"task {row + 1}"


def test_held_out_conversations_are_read_and_figures_are_not(tmp_path: Path) -> None:
    run = write_record(tmp_path / "run", a_tree())
    folder = run / "evaluations" / "rl"
    folder.mkdir(parents=True)
    held_out = a_tree(step=40, replies=[a_reply()])
    (folder / "step_00000040.jsonl").write_text(json.dumps(held_out) + "\n" + '{"schema":1,"step":40,"torn')
    (folder / "figures.jsonl").write_text('{"step": 40, "accuracy": 0.9}\n')
    (run / "base.jsonl").write_text(json.dumps(a_tree(step=0)) + "\n")
    found = [("rl", False), ("base", True), ("rl/step_00000040", True)]
    assert [(source.name, source.held_out) for source in find_sources(run)] == found
    assert column(payload_of(run), "step") == [12, 0, 40]


def test_steps_and_runs_show_the_same_prompt_under_one_number(tmp_path: Path) -> None:
    other = a_tree(step=20, task_id="chair-1")
    first = write_record(tmp_path / "a", a_tree(step=0), a_tree(step=20), other, a_tree(step=21))
    second = write_record(tmp_path / "b", a_tree(step=20))
    payload = payload_of(first, second, steps=(0, 20))
    assert column(payload, "step") == [0, 20, 20, 20]
    assert column(payload, "run") == [0, 0, 0, 1]
    same, again, different, in_b = column(payload, "prompt")
    assert same == again == in_b != different


def test_a_step_without_trees_is_a_mistake_that_names_those_there_are(tmp_path: Path) -> None:
    run = write_record(tmp_path / "run", a_tree(step=5), a_tree(step=6))
    with pytest.raises(UserError, match=r"step 40, of which no tree is there: choose from 5, 6"):
        payload_of(run, steps=(5, 40))


def test_trees_over_the_limit_are_counted(tmp_path: Path) -> None:
    payload = payload_of(write_record(tmp_path / "run", *(a_tree(step=step) for step in range(1, 6))), max_trees=2)
    assert (payload.trees, payload.left_out, json.loads(payload.index)["left_out"]) == (2, 3, 3)


@pytest.mark.parametrize("schema", [2, None, "1"], ids=["newer", "none", "text"])
def test_a_record_of_another_form_is_refused(tmp_path: Path, schema: object) -> None:
    with pytest.raises(UserError, match="this viewer knows 1"):
        payload_of(write_record(tmp_path / "run", a_tree(schema=schema)))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run = write_record(tmp_path / "run", a_tree())
    with (run / "conversations" / "rl" / "shard0.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        payload_of(run)


def test_a_folder_without_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no conversations"):
        find_sources(tmp_path)
    with pytest.raises(UserError, match="there is no run folder"):
        find_sources(tmp_path / "missing")


def test_steps_are_numbers() -> None:
    assert parse_steps("40, 0,20,20") == (0, 20, 40)
    assert parse_steps("") == ()
    with pytest.raises(UserError, match="--steps 0-40 is not a list of steps"):
        parse_steps("0-40")


def test_token_ids_get_the_text_of_the_newest_checkpoints_tokenizer(tmp_path: Path) -> None:
    for step, word in ((20, "old"), (40, "new")):
        folder = tmp_path / "checkpoints" / "rl" / f"step_{step:08d}" / "hf"
        folder.mkdir(parents=True)
        Tokenizer(WordLevel({word: 0, "day": 1}, unk_token=word)).save(str(folder / "tokenizer.json"))
    file = find_tokenizer(tmp_path)
    assert file is not None
    assert token_words(file, {0, 1, 7}) == {0: "new", 1: "day"}
    assert find_tokenizer(tmp_path / "checkpoints") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        token_words(tmp_path, {0})
