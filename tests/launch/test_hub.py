"""A model by its hub name: a dry run fetches its small files and the headers of its weights, the start the weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from collab_megatron.data.parquet import Conversation, write_conversations
from collab_megatron.types import Message
from tests.conftest import REPOSITORY, environment
from tests.launch.hub import Hub, serving

pytestmark = pytest.mark.slow

NAME = "someone/tiny"


def dry_run(hub: Hub, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    chat = (Message("user", "a"), Message("assistant", "b"))
    write_conversations(tmp_path / "sft.parquet", [Conversation("c1", chat)])
    argv = [
        *("-m", "collab_megatron.train_sft", "conf/demo_sft.yaml", "--dry-run", f"run.dir={tmp_path / 'run'}"),
        *(f"model.path={NAME}", f"data.train={tmp_path / 'sft.parquet'}", "export_hf=null", *more),
    ]
    hub_environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, *argv],
        cwd=REPOSITORY,
        env={**environment(), **hub_environment, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_dry_run_fetches_headers_and_no_weights(tiny_model: Path, tmp_path: Path) -> None:
    with serving(NAME, tiny_model) as hub:
        done = dry_run(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "1,279,232 parameters" in done.stdout
        assert hub.sent["config.json"] > 0
        assert 0 < hub.sent["model.safetensors"] <= 100_001  # what huggingface_hub asks for to read a header
        assert (tiny_model / "model.safetensors").stat().st_size > 20 * hub.sent["model.safetensors"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_model_that_the_hub_does_not_have_is_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    with serving("someone/else", tiny_model) as hub:
        done = dry_run(hub, tmp_path)
    assert done.returncode == 2, done.stdout
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"model {NAME} is not a folder and cannot be fetched from the hub" in sentence
    assert "Traceback" not in done.stderr
