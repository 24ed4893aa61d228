"""What tools/pictures.py reads and writes; the pictures need a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.errors import UserError
from collab_megatron.view.sources import find_sources
from tools.pictures import evaluated_steps, read_live
from tools.pictures_hostile import hostile_trees, write_hostile_record


def test_the_hostile_record_is_one_that_the_viewer_reads(tmp_path: Path) -> None:
    write_hostile_record(tmp_path / "run")
    (source,) = find_sources(tmp_path / "run")
    assert list(source.trees()) == hostile_trees()


def test_evaluated_steps_are_those_with_transcripts(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "rl"
    folder.mkdir(parents=True)
    for name in ("step_00000020.jsonl", "step_00000002.jsonl", "other.jsonl"):
        (folder / name).touch()
    assert evaluated_steps(tmp_path) == [2, 20]
    with pytest.raises(UserError, match="has no held-out conversations"):
        evaluated_steps(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"url": "http://127.0.0.1:1"}'])
def test_a_file_that_is_no_live_json_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "live.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"is not the live\.json of a run"):
        read_live(file)
