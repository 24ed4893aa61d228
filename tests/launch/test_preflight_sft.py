"""What the trainer would refuse of supervised data is refused before a process is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.config import SFTConfig, load_config
from collab_megatron.data.parquet import Conversation, write_conversations
from collab_megatron.errors import UserError
from collab_megatron.launch.preflight import check_supervised
from collab_megatron.types import Message
from tests.conftest import REPOSITORY


def test_conversations_that_cannot_be_trained_are_found_before_the_start(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that the trainer would refuse, in the training file and the held-out one."""
    names = {"short": ["b"] * 3, "some": ["b", "b", "b " * 400], "long": ["b", "b " * 400, "b " * 500], "none": None}
    files = {name: tmp_path / f"{name}.parquet" for name in names}
    for name, replies in names.items():
        chats = [(Message("user", "a"), Message("assistant", reply)) for reply in replies or ()]
        chats = chats or [(Message("user", "a"), Message("user", "b"))]
        write_conversations(files[name], [Conversation(f"c{number}", chat) for number, chat in enumerate(chats)])

    def load(train: str, validation: str) -> SFTConfig:
        paths = (f"run.dir={tmp_path}", f"model.path={tiny_model}", "max_tokens=100", "export_hf=null")
        data = (f"data.train={files[train]}", f"data.validation={files[validation]}")
        return load_config(SFTConfig, REPOSITORY / "conf" / "demo_sft.yaml", [*paths, *data])

    for train, validation in (("long", "short"), ("short", "long")):
        for dry_run in (False, True):
            with pytest.raises(UserError, match=r"2 of 3 conversations of .*long.parquet .*: raise max_tokens"):
                check_supervised(load(train, validation), dry_run=dry_run)
    with pytest.raises(UserError, match=r"conversation 1 of .*none.parquet .* no assistant turn"):
        check_supervised(load("none", "short"))
    assert not capsys.readouterr().out  # no plan of what cannot run
    check_supervised(load("some", "short"), dry_run=True)
    assert "left out: 1 of 3 conversations" in capsys.readouterr().out
    check_supervised(load("some", "short"))
    assert "left out" not in capsys.readouterr().out
