"""The last lines of a run: what it leaves, what is saved, what to type next."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from collab_megatron.config.sections import RunSection
from collab_megatron.errors import RunError
from collab_megatron.launch.end_report import last_evaluation, report_at_end
from collab_megatron.wire.checkpoints import step_folder, write_marker

CONFIG = Path("conf/mine.yaml")


def run_with_checkpoint(folder: Path, *, resume: bool = False) -> RunSection:
    """20 steps saved, evaluated after 10 and 20."""
    run = RunSection(dir=folder, name="rl", resume=resume)
    model = step_folder(run.checkpoints_dir, 20) / "model"
    model.mkdir(parents=True)
    (model / "metadata.json").write_text("{}")
    write_marker(step_folder(run.checkpoints_dir, 20), step=20, layout={}, extra={})
    run.tensorboard_dir.mkdir(parents=True)
    rows = [
        {"step": 10, "eval/mr": 0.5},
        {"step": 20, "reward/mr_mean": 0.7, "time_s/step": 2.0},
        {"step": 20, "eval/mr": 0.9, "eval/accuracy": 0.75, "eval/accuracy_std": 0.1, "eval/wall_s": 3.0},
        {"step": 21, "reward/mr_mean": 0.7},
    ]
    (run.tensorboard_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_finished_run_tells_what_it_leaves_and_what_to_type_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_checkpoint(tmp_path)
    with report_at_end(run, 20, CONFIG):
        pass
    checkpoint = tmp_path / "checkpoints" / "rl" / "step_00000020"
    assert capsys.readouterr().out.splitlines() == [
        "",
        "done        20 steps of rl",
        f"checkpoint  {checkpoint}, 20 of 20 steps",
        "held out    after step 20: mr 0.9, accuracy 0.75",
        f"export      python tools/convert_checkpoint.py megatron-to-hf --checkpoint {checkpoint} --output "
        f"{tmp_path / 'rl_hf'}",
        f"evaluate    python -m collab_megatron.evaluate conf/mine.yaml model.path={checkpoint}",
        f"curves      tensorboard --logdir {tmp_path / 'tensorboard'}",
    ]
    with report_at_end(run, 20, None, exported=tmp_path / "hf"):
        pass
    told = capsys.readouterr().out
    assert f"model       {tmp_path / 'hf'}" in told
    assert "export  " not in told
    assert "evaluate  " not in told  # it cannot read the config of a supervised run


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RunError("a disk is full"), SystemExit(1), SystemExit(3)])
def test_an_ended_run_tells_what_is_saved_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: BaseException
) -> None:
    run = run_with_checkpoint(tmp_path)
    with pytest.raises(type(end)), report_at_end(run, 40, CONFIG):
        raise end
    told = capsys.readouterr()
    assert f"{tmp_path / 'checkpoints' / 'rl' / 'step_00000020'}, 20 of 40 steps: the same command with " in told.err
    assert told.err.endswith("run.resume=true goes on from it\n")
    assert not told.out


def test_after_the_last_step_a_resume_finishes_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last evaluation or the export failed, and training is done."""
    run = run_with_checkpoint(tmp_path)
    with pytest.raises(RunError), report_at_end(run, 20, CONFIG):
        raise RunError("no engine is left")
    told = capsys.readouterr().err
    assert "goes on from it" not in told
    assert "20 of 20 steps: training is done, the same command with run.resume=true finishes the rest" in told


def test_nothing_is_promised_where_nothing_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunSection(dir=tmp_path, name="rl")
    with pytest.raises(KeyboardInterrupt), report_at_end(run, 40, CONFIG):
        raise KeyboardInterrupt
    assert "no checkpoint yet: the same command starts from the beginning" in capsys.readouterr().err
    with pytest.raises(SystemExit), report_at_end(run, 40, CONFIG):
        sys.exit(2)  # a mistake of the user: nothing was started
    assert not capsys.readouterr().err
    with report_at_end(run, 40, CONFIG):
        pass
    assert "export" not in capsys.readouterr().out
    resumed = run_with_checkpoint(tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt), report_at_end(resumed, 40, CONFIG):
        raise KeyboardInterrupt
    assert "20 of 40 steps: the same command goes on from it" in capsys.readouterr().err


def test_the_last_evaluation_is_read_from_the_dashboards_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_evaluation(file) is None
    file.write_text('{"step": 1, "reward/mr_mean": 0.1}\n')
    assert last_evaluation(file) is None
    many = {f"eval/m{number}": float(number) for number in range(9)} | {"eval/loss": 0.5, "eval/conversations": 8.0}
    file.write_text(json.dumps({"step": 4, **many}) + "\n")
    newest = (4, {"loss": 0.5, "m0": 0.0, "m1": 1.0, "m2": 2.0, "m3": 3.0, "m4": 4.0})
    assert last_evaluation(file) == newest
    file.write_text(file.read_text() + '{"step": 5, "eval/mr"')  # a run that was killed since
    assert last_evaluation(file) == newest
