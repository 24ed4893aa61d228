"""Problems from any single-turn dataset: columns mapped by templates, the shipped mappings, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from collab_megatron.config import BuildDatasetConfig, load_config
from collab_megatron.data_engine.problems import Problems, read_problems
from collab_megatron.errors import UserError
from collab_megatron.types import Message
from tests.conftest import REPOSITORY

MATH = [
    {
        "problem": f"What is {n} + $1?",
        "solution": f"It is \\boxed{{{n + 1}}}.",
        "level": f"Level {n}",
        "type": "Algebra",
    }
    for n in range(1, 6)
]
ARTICLES: list[dict[str, Any]] = [
    {"title": f"Title {n}", "text": "word " * n, "timestamp": f"2021-0{n}-01", "url": "u", "authors": [], "tags": ["t"]}
    for n in (2, 3, 1)
] + [{"title": "no time", "text": "word", "timestamp": None, "url": "u", "authors": [], "tags": []}]
CODE = [
    {
        "task_id": "B/0",
        "instruct_prompt": "Write f.",
        "complete_prompt": "-",
        "code_prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "assert f() == 1",
        "entry_point": "f",
        "libs": "[]",
    }
]
AMBIGUOUS = [  # nested as the hub delivers a sequence of mappings: a mapping of lists
    {
        "question": "When did it open?",
        "annotations": {
            "type": ["multipleQAs"],
            "answer": [[]],
            "qaPairs": [{"question": ["When did it open in Rome?", "In Paris?"], "answer": [["1990", "90"], ["1991"]]}],
        },
    },
    {
        "question": "Who wrote Faust?",
        "annotations": {"type": ["singleAnswer"], "answer": [["Goethe", "J. W. Goethe"]], "qaPairs": [{}]},
    },
]
STORIES = [
    {
        "story": "Ann met Bea.",
        "target_turn": {"question": "Who?", "answer": "Bea"},
        "ambiguity": "ambiguous",
        "clarification_turn": {
            "question": "Who is met?",
            "answers": [
                {"clr_ans": "who met somebody", "org_ans": "Ann"},
                {"clr_ans": "who was met", "org_ans": "Bea"},
            ],
        },
        "source": "x",
    },
    {
        "story": "Ann met Bea.",
        "target_turn": {"question": "Whom?", "answer": "Bea"},
        "source": "x",
        "ambiguity": "non_ambiguous",
        "clarification_turn": None,
    },
]


def config_of(folder: Path, problems: Any, **changes: Any) -> BuildDatasetConfig:
    llm = {"model": "hosted_vllm/x", "api_key_env": None}
    return BuildDatasetConfig.model_validate(
        {
            "problems": str(problems),
            "output": str(folder / "out"),
            "simulators": {"user": llm, "judge": llm, "assistant": llm},
            **changes,
        }
    )


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def shipped(name: str, folder: Path, rows: list[Any]) -> Problems:
    """The problems of conf/mappings/NAME.yaml over `rows`, as a hub dataset would deliver them."""
    config = folder / "config.yaml"
    llm = {"model": "hosted_vllm/x", "api_key_env": None}
    own = {"extends": str(REPOSITORY / "conf" / "mappings" / f"{name}.yaml"), "output": str(folder / "out")}
    config.write_text(yaml.safe_dump({**own, "simulators": {"user": llm, "judge": llm, "assistant": llm}}))
    parquet = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    overrides = [f"problems={parquet}", "problems_split=[]", "problems_subset=null"]
    return read_problems(load_config(BuildDatasetConfig, config, overrides))


def test_every_place_gives_the_same_problems(tmp_path: Path) -> None:
    rows = [
        {"single_turn_prompt": f"task {n}", "single_turn_completion": f"answer {n}", "prompt": "hi"} for n in (1, 2)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "part.jsonl", rows)
    expected = read_problems(config_of(tmp_path, jsonl(tmp_path / "a.jsonl", rows)))
    assert [problem.task.ground_truth for problem in expected.chosen] == ["answer 1", "answer 2"]
    assert expected.chosen[0].task.prompt == (Message("user", "hi"),)
    for name in ("a.json", "a.parquet", "saved", "folder"):
        assert read_problems(config_of(tmp_path, tmp_path / name)) == expected, name
    limited = read_problems(config_of(tmp_path, tmp_path / "a.jsonl", num_conversations=1))
    assert limited.contents == expected.contents
    assert len(limited.chosen) == 1


def test_the_mapping_of_math(tmp_path: Path) -> None:
    found = shipped("math", tmp_path, MATH).chosen
    assert found[0].task.single_turn_prompt == "What is 1 + $1?"  # a dollar of the row is no column
    assert found[0].task.ground_truth == "It is \\boxed{2}."
    assert found[0].task.metadata == {"level": "Level 1", "type": "Algebra"}
    assert found[0].task.prompt == ()
    assert found[0].task.task_desc


def test_the_mapping_of_documents_takes_the_newest_short_ones(tmp_path: Path) -> None:
    long = {**ARTICLES[0], "text": "word " * 2000, "timestamp": "2021-09-01"}
    found = shipped("medium", tmp_path, [*ARTICLES, long])
    assert [problem.index for problem in found.chosen] == [1, 0, 2]  # by time, newest first; places in the dataset
    assert "Title 3" in found.chosen[0].task.single_turn_prompt
    assert "word word word" in found.chosen[0].task.single_turn_prompt
    assert found.chosen[0].task.ground_truth == "word " * 3
    assert found.notices == [
        "left out: 1 of 5 rows that the mapping does not want",
        "left out: 1 rows with a reference over mapping.max_completion_tokens",
    ]


def test_the_mapping_of_code_keeps_what_the_tests_need(tmp_path: Path) -> None:
    (problem,) = shipped("bigcodebench", tmp_path, CODE).chosen
    assert problem.task.single_turn_prompt == "Write f."
    assert problem.task.ground_truth == "def f():\n    return 1\n"
    assert problem.task.metadata == {
        "task_id": "B/0",
        "test": "assert f() == 1",
        "entry_point": "f",
        "code_prompt": "def f():\n",
    }


def test_the_mapping_of_ambiguous_questions_opens_with_what_was_asked(tmp_path: Path) -> None:
    ambiguous, plain = shipped("ambig_qa", tmp_path, AMBIGUOUS).chosen
    assert ambiguous.task.prompt == (Message("user", "When did it open?"),)
    assert ambiguous.task.single_turn_prompt == "When did it open in Rome?"
    assert (ambiguous.task.ground_truth, ambiguous.task.ambiguous) == ("1990", True)
    assert plain.task.single_turn_prompt == "Who wrote Faust?"
    assert (plain.task.ground_truth, plain.task.ambiguous) == ("Goethe", False)


def test_the_mapping_of_stories(tmp_path: Path) -> None:
    ambiguous, plain = shipped("abg_coqa", tmp_path, STORIES).chosen
    assert "who met somebody" in ambiguous.task.single_turn_prompt
    assert "who met somebody" not in ambiguous.task.prompt[0].content
    assert (ambiguous.task.ground_truth, ambiguous.task.ambiguous) == ("Ann", True)
    assert (plain.task.ground_truth, plain.task.ambiguous) == ("Bea", False)


def test_rows_are_chosen_by_value(tmp_path: Path) -> None:
    mapping = {"single_turn_prompt": "$problem", "single_turn_completion": "$solution"}
    source = jsonl(tmp_path / "rows.jsonl", MATH)
    hard = read_problems(config_of(tmp_path, source, mapping={**mapping, "where": {"level": ["Level 4", "Level 5"]}}))
    assert [problem.index for problem in hard.chosen] == [3, 4]
    with pytest.raises(UserError, match=r"names the column 'levels', which no row has; its columns are problem, "):
        read_problems(config_of(tmp_path, source, mapping={**mapping, "where": {"levels": "Level 4"}}))
    with pytest.raises(UserError, match=r"holds no problems that can be used \(left out: 5 of 5 rows"):
        read_problems(config_of(tmp_path, source, mapping={**mapping, "where": {"level": "Level 9"}}))
    mixed = jsonl(tmp_path / "mixed.jsonl", [{**MATH[0], "level": 1}, MATH[1]])
    with pytest.raises(UserError, match="several types"):
        read_problems(config_of(tmp_path, mixed, mapping={**mapping, "largest_first": "level"}))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("$5 $problem", "contains a lone"),
        ("problem", "names no column"),
        ([], "at least one template"),
    ],
)
def test_a_bad_template_is_refused(tmp_path: Path, template: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config_of(tmp_path, "x.jsonl", mapping={"single_turn_prompt": template, "single_turn_completion": "$solution"})


def test_rows_that_are_no_problems_stop_or_are_counted(tmp_path: Path) -> None:
    mapping = {"single_turn_prompt": "$problem", "single_turn_completion": ["${answers.0}", "$solution"]}
    bad = [{"problem": "x"}, 7, {"problem": " ", "solution": "y"}, {"problem": "a\ud83d", "solution": "y"}]
    source = tmp_path / "rows.jsonl"
    source.write_bytes("\n".join(map(json.dumps, [*bad, *MATH])).encode() + b"\n\xff\n{")
    found = read_problems(config_of(tmp_path, source, mapping=mapping, on_bad_problem="skip"))
    assert [problem.index for problem in found.chosen] == [4, 5, 6, 7, 8]
    (notice,) = found.notices
    assert notice.startswith("skipped 6 of 11 rows: ")
    with pytest.raises(UserError, match="line 10 is not UTF-8"):
        read_problems(config_of(tmp_path, source, mapping=mapping))
    with pytest.raises(
        UserError, match=r"problem 1 has no text 'solution' for the mapping's '\$solution'; its columns"
    ):
        read_problems(config_of(tmp_path, jsonl(source, [*bad, *MATH]), mapping=mapping))


def test_a_hub_dataset_is_asked_for_its_subset_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"problem": f"task of {split}", "solution": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    mapping = {"single_turn_prompt": "$problem", "single_turn_completion": "$solution"}
    hub = {"problems_split": ["train", "test"], "problems_subset": "hard", "mapping": mapping}
    found = read_problems(config_of(tmp_path, "owner/set", **hub))
    assert asked == [("owner/set", "hard", "train"), ("owner/set", "hard", "test")]
    assert [problem.task.single_turn_prompt for problem in found.chosen] == ["task of train", "task of test"]
    read_problems(config_of(tmp_path, "owner/set", mapping=mapping))
    assert asked[-1] == ("owner/set", None, "train")
