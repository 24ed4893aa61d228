"""Engines with another torch or NCCL than the trainer's are refused by name, before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from collab_megatron.config.sections import EngineSection, SyncSection
from collab_megatron.errors import UserError
from collab_megatron.launch import engine_versions
from collab_megatron.launch.engine_versions import Versions, ask, check_versions

OURS = ("2.14.1", "13.0", "2.30.7")
OLDER = ("2.13.0", "13.0", "2.29.7")


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's interpreter has OURS."""
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "trainer", OURS))


def interpreter(file: Path, versions: tuple[str, str | None, str] | None, script: str = "") -> str:
    """A stand-in for an interpreter that answers with these versions."""
    answer = "" if versions is None else f"echo some warning; echo '{json.dumps(versions)}'"
    file.write_text(f"#!/bin/sh\n{script}\n{answer}\n")
    file.chmod(0o755)
    return str(file)


def check(python: str, transport: str = "broadcast", device: str = "cuda", **engine: object) -> None:
    check_versions(
        EngineSection.model_validate({"python": python, **engine}),
        SyncSection.model_validate({"transport": transport}),
        device,
    )


@pytest.mark.usefixtures("trainer")
@pytest.mark.parametrize("transport", ["broadcast", "ipc", "auto"])
def test_another_nccl_is_refused_by_name(tmp_path: Path, transport: str) -> None:
    with pytest.raises(UserError) as caught:
        check(interpreter(tmp_path / "engine", OLDER), transport)
    text = str(caught.value)
    assert f"engine.python={tmp_path / 'engine'} has torch 2.13.0 for CUDA 13.0, NCCL 2.29.7" in text
    assert f"the trainer's {tmp_path / 'trainer'} has torch 2.14.1 for CUDA 13.0, NCCL 2.30.7" in text
    used = "broadcast" if transport == "auto" else transport
    assert f"sync.transport={used} needs the same" in text
    assert "or set sync.transport=disk" in text


@pytest.mark.usefixtures("trainer")
def test_a_torch_without_cuda_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has torch 2\.14\.1 for CPU only"):
        check(interpreter(tmp_path / "engine", ("2.14.1", None, "")))


@pytest.mark.usefixtures("trainer")
def test_an_interpreter_without_torch_is_refused(tmp_path: Path) -> None:
    lacking = "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1"
    with pytest.raises(UserError, match=r"torch cannot be imported by .*engine \(ModuleNotFoundError: .*install it"):
        check(interpreter(tmp_path / "engine", None, lacking))


@pytest.mark.usefixtures("trainer")
def test_what_shares_no_gpu_is_not_asked(tmp_path: Path) -> None:
    check(interpreter(tmp_path / "engine", OURS))
    other = interpreter(tmp_path / "other", OLDER)
    check(other, "disk")
    check(other, device="cpu")
    check(other, urls=("http://a:1",))
    check_versions(EngineSection(), SyncSection(), "cuda")  # one environment


@pytest.mark.usefixtures("trainer")
def test_a_slow_import_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_versions, "VERSIONS_TIMEOUT_S", 0.5)
    check(interpreter(tmp_path / "engine", None, "exec sleep 30"))
    assert "were not checked" in caplog.text


@pytest.mark.slow
def test_this_interpreter_answers() -> None:
    import torch  # here: the other tests need none

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else ""
    assert ask(sys.executable, False) == Versions(torch.__version__.partition("+")[0], torch.version.cuda, nccl)
