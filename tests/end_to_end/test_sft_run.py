"""Supervised training that overfits: the best checkpoint is an early one, outlives the others, and is exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.data.parquet import Conversation, write_conversations
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.types import Message
from collab_megatron.wire.checkpoints import complete_checkpoints, read_best
from tests.conftest import Run
from tests.end_to_end.test_short_demo import plain_loss

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def chats(path: Path, reply: str) -> Path:
    openings = ("hi", "a table for 4 please", "a room on monday", "a taxi at noon")
    write_conversations(
        path,
        [Conversation(str(i), (Message("user", o), Message("assistant", reply))) for i, o in enumerate(openings)],
    )
    return path


def test_the_best_checkpoint_is_kept_resumed_with_and_exported(warm_run: Run, tiny_model: Path, tmp_path: Path) -> None:
    train = chats(tmp_path / "train.parquet", "which time and day and name?")
    held_out = chats(tmp_path / "held_out.parquet", "which time and judy?")

    def sft(steps: int, *overrides: str):
        return warm_run(
            *("-m", "collab_megatron.train_sft", "conf/demo_sft.yaml", f"run.dir={tmp_path / 'run'}"),
            *(f"model.path={tiny_model}", f"data.train=[{train}]", f"data.validation={held_out}"),
            *("parallel.tensor=1", f"train.steps={steps}", "train.eval_interval=1", "train.keep_last=1"),
            *(
                "batch_size=3",
                "optimizer={lr: 0.001, schedule: constant, warmup_steps: 0}",
                "max_tokens=64",
                *overrides,
            ),
        )

    ended = sft(8, "export_hf=null")
    assert ended.code == 0, ended.output[-4000:]
    # as after a kill in the export that tore the last line too
    metrics = tmp_path / "run" / "tensorboard" / "sft" / "metrics.jsonl"
    *lines, last = metrics.read_bytes().splitlines(keepends=True)
    assert b"eval/loss" not in last  # a checkpoint's time
    metrics.write_bytes(b"".join(lines) + last[:9])
    ended = sft(8, f"export_hf={tmp_path / 'best'}", "run.resume=auto")
    assert ended.code == 0, ended.output[-4000:]
    assert f"still to do: the export to {tmp_path / 'best'}" in ended.output
    assert "sft 8/8" not in ended.output
    folder = tmp_path / "run" / "checkpoints" / "sft"
    best = read_best(folder)
    assert best is not None
    rows = read_metrics(tmp_path / "run" / "tensorboard" / "sft")
    losses = {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}
    assert best.step == min(range(1, 9), key=losses.__getitem__) < 8
    assert [path.name for path in complete_checkpoints(folder)] == [best.folder.name, "step_00000008"]
    assert plain_loss(tmp_path / "best", held_out) == pytest.approx(best.loss, rel=1e-5)

    # a step that leaves infinite weights ends the run, and what is saved is the step before it
    ruined = sft(10, "run.resume=true", "optimizer.lr=1e37", "optimizer.weight_decay=100")
    assert ruined.code == 1, ruined.output[-4000:]
    (error,) = ruined.errors
    assert "lr 1e+37" in error
    assert "left weights that are NaN or infinite" in error
    assert "step 8 is saved" in ruined.output
    assert [path.name for path in complete_checkpoints(folder)] == [best.folder.name, "step_00000008"]

    # resumed, the run remembers which was the best; an asynchronous save protects it too
    again = sft(10, "run.resume=true", "train.async_save=true", "export_weights=last", f"export_hf={tmp_path / 'last'}")
    assert again.code == 0, again.output[-4000:]
    assert "the lowest so far" not in again.output
    assert read_best(folder) == best
    assert [path.name for path in complete_checkpoints(folder)] == [best.folder.name, "step_00000010"]
    assert plain_loss(tmp_path / "last", held_out) > best.loss * 1.05

    converted = warm_run(
        *("tools/convert_checkpoint.py", "megatron-to-hf", "--checkpoint", str(folder), "--best"),
        *("--output", str(tmp_path / "converted")),
    )
    assert converted.code == 0, converted.output[-4000:]
    assert plain_loss(tmp_path / "converted", held_out) == pytest.approx(best.loss, rel=1e-5)
