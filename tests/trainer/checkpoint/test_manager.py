"""Start of a run: its own newest checkpoint, the weights of another run, or the model's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from collab_megatron.config.sections import RunSection, TrainSection
from collab_megatron.errors import UserError
from collab_megatron.trainer.checkpoint import manager
from collab_megatron.trainer.checkpoint.manager import CheckpointManager
from collab_megatron.wire.checkpoints import CheckpointInfo, read_info, step_folder, write_marker


def complete(directory: Path, *steps: int) -> None:
    for step in steps:
        folder = step_folder(directory, step)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "metadata.json").write_text("{}")
        write_marker(folder, step=step, layout={}, extra={})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded into the actor, in order."""
    calls: list[str] = []

    def load(what: str) -> Any:
        def loads(actor: object, folder: Path) -> CheckpointInfo:
            calls.append(f"{what} of {folder.parent.name}/{folder.name}")
            return read_info(folder)

        return loads

    monkeypatch.setattr(manager, "load_checkpoint", load("state"))
    monkeypatch.setattr(manager, "load_weights", load("weights"))
    return calls


def checkpoints(tmp_path: Path, **run: Any) -> CheckpointManager:
    actor = cast(Any, SimpleNamespace(grid=SimpleNamespace(is_main=True)))
    section = RunSection(dir=tmp_path / "run", name="mine", **run)
    return CheckpointManager(actor, section, TrainSection(), config={}, rows_per_step=4)


@pytest.mark.parametrize("resume", [True, False, "auto"])
def test_a_new_run_begins_with_the_weights_that_init_from_names(
    tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str], resume: bool | str
) -> None:
    complete(tmp_path / "other", 3, 12)
    mine = checkpoints(tmp_path, init_from=tmp_path / "other", resume=resume)
    assert (mine.resume(), mine.saved) == (0, 0)  # optimizer, steps and data order begin at zero
    assert loaded == ["weights of other/step_00000012"]
    assert "starting from the weights of" in capsys.readouterr().out
    named = checkpoints(tmp_path, init_from=step_folder(tmp_path / "other", 3), resume=resume)
    named.resume()
    assert loaded[1:] == ["weights of other/step_00000003"]


def test_a_resume_does_not_look_at_init_from(tmp_path: Path, loaded: list[str]) -> None:
    complete(tmp_path / "run" / "checkpoints" / "mine", 7)
    mine = checkpoints(tmp_path, init_from=tmp_path / "gone", resume=True)
    assert (mine.resume(), mine.saved) == (7, 7)
    assert loaded == ["state of mine/step_00000007"]


def test_what_init_from_names_must_be_a_checkpoint(tmp_path: Path, loaded: list[str]) -> None:
    with pytest.raises(UserError, match=r"gone is not a complete checkpoint and holds none"):
        checkpoints(tmp_path, init_from=tmp_path / "gone").resume()
    assert loaded == []


def test_without_either_nothing_is_loaded(tmp_path: Path, loaded: list[str]) -> None:
    assert checkpoints(tmp_path, resume="auto").resume() == 0
    assert loaded == []
