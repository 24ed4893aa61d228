"""Which checkpoint a path names, and where its Hugging Face folder lies. The conversion itself: tests/end_to_end."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.errors import UserError
from collab_megatron.launch import conversion as module
from collab_megatron.launch.conversion import checkpoint_of, hf_folder_of
from collab_megatron.wire.checkpoints import step_folder, write_marker


def checkpoint(run: Path, step: int) -> Path:
    folder = step_folder(run, step)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "metadata.json").write_text("{}")
    write_marker(folder, step=step, layout={}, extra={})
    return folder


def test_a_path_names_a_step_or_the_newest_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints" / "rl"
    first, second = checkpoint(run, 20), checkpoint(run, 40)
    torn = step_folder(run, 60)
    torn.mkdir()
    assert checkpoint_of(str(first)) == first
    assert checkpoint_of(str(run)) == second
    with pytest.raises(UserError, match="step_00000060 is not a complete checkpoint"):
        checkpoint_of(str(torn))
    (second / "complete.json").unlink()
    (first / "complete.json").unlink()
    with pytest.raises(UserError, match="has no complete checkpoint"):
        checkpoint_of(str(run))


def test_models_are_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert checkpoint_of(str(tmp_path / "hf")) is None
    assert checkpoint_of("Qwen/Qwen2.5-7B") is None
    assert checkpoint_of(str(tmp_path)) is None


def test_a_converted_checkpoint_is_found_again_and_another_of_its_name_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    class NoProcess:
        def __init__(self, logs_dir: Path) -> None: ...
        def __enter__(self) -> NoProcess:
            return self

        def __exit__(self, *error: object) -> None: ...
        def wait_for(self, children: object) -> None: ...
        def start(self, name: str, argv: list[str], env: dict[str, str], **rest: object) -> None:
            made.append(argv)
            Path(argv[-1]).mkdir(parents=True)

    monkeypatch.setattr(module, "Supervisor", NoProcess)
    source = checkpoint(tmp_path / "checkpoints" / "rl", 40)
    folder = hf_folder_of(source, tmp_path / "converted", tmp_path)
    assert folder.name.startswith("rl-step_00000040-")
    assert hf_folder_of(source, tmp_path / "converted", tmp_path) == folder
    assert len(made) == 1
    (source / "model" / "metadata.json").write_text("{ }")  # the run was started over and came here again
    assert hf_folder_of(source, tmp_path / "converted", tmp_path) != folder
    assert len(made) == 2
