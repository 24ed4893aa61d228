"""Malformed single-turn datasets, drawn by hypothesis: read_problems ends with a sentence or counts what it skips."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from collab_megatron.config import BuildDatasetConfig
from collab_megatron.data_engine.problems import Problems, read_problems
from collab_megatron.errors import UserError
from tests.data.test_malformed_datasets import TWO_MB, chats, wrong_values
from tests.data_engine.test_problems import config_of

SOUND = {"single_turn_prompt": "book a room", "single_turn_completion": "done", "q": {"text": ["book a room"]}, "n": 1}
MAPPING = {
    "single_turn_prompt": ["${q.text.0}", "$single_turn_prompt"],
    "single_turn_completion": "$single_turn_completion",
    "prompt": "$prompt",
    "metadata": {"n": "n", "q": "q"},
    "ambiguous_where": {"n": 1},
    "where": {"n": [1, None, "x"]},
    "largest_first": "n",
    "max_completion_tokens": 5,
}
columns = st.sampled_from([*SOUND, "prompt", "single_turn_metadata", "task_desc"])
rows_drawn = st.lists(
    st.builds(lambda changes: {**SOUND, **changes}, st.dictionaries(columns, wrong_values | chats, max_size=3))
    | wrong_values,
    max_size=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows_drawn, st.booleans(), st.sampled_from(["stop", "skip"]))
@example([{**SOUND, "prompt": [{"role": "tool", "content": "x"}]}], False, "stop")
@example([{**SOUND, "prompt": {"role": "user"}}], False, "skip")
@example([{**SOUND, "single_turn_prompt": TWO_MB}], False, "stop")
@example([{**SOUND, "n": [1]}, {**SOUND, "n": 2}], True, "skip")
@example([SOUND, 7, None, [], "\ud83d"], True, "skip")
@pytest.mark.slow
def test_rows_of_any_kind_end_in_a_sentence_or_in_problems(
    rows: list[Any], mapped: bool, on_bad: Literal["stop", "skip"]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
        config = config_of(Path(folder), source, mapping=MAPPING if mapped else None, on_bad_problem=on_bad)
        found, sentence = read(config)
        if found is None:
            assert 20 < len(sentence) < 4000
            return
        assert 0 < len(found.chosen) <= len(rows)
        for problem in found.chosen:
            assert problem.task.single_turn_prompt.strip()
            json.dumps({"prompt": [m.as_dict() for m in problem.task.prompt], **problem.task.metadata})
        if on_bad == "stop" and not mapped:
            assert len(found.chosen) == len(rows)
        if len(found.chosen) < len(rows):
            assert found.notices
        "".join(found.notices).encode()


def read(config: BuildDatasetConfig) -> tuple[Problems | None, str]:
    """The problems, or None and the sentence."""
    try:
        return read_problems(config), ""
    except UserError as error:
        return None, str(error)
