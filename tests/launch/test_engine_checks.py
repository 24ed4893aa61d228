"""What the table of bad inputs cannot reach: SGLang's answers from a stand-in, ports that others hold, what is left."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import EngineCommand, engine_command
from collab_megatron.errors import UserError
from collab_megatron.launch.engine_checks import LONGER_CONTEXT, check_context_length, check_engine, check_flags
from collab_megatron.launch.path_checks import check_file, check_folder
from collab_megatron.model.spec import model_spec

HF = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def interpreter(folder: Path, script: str) -> EngineCommand:
    """A command whose interpreter is a shell script."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    section = EngineSection(python=str(python), extra_args=("--flag", "x"))
    return engine_command(section, model_path="m", dtype="float32", device="cpu", port=1, seed=1)


def test_sglang_is_given_the_command_line_as_it_would_run(tmp_path: Path) -> None:
    check_flags(
        interpreter(tmp_path, f'shift 2; echo "$@" > {tmp_path}/given; echo "$SGLANG_USE_CPU_ENGINE" > {tmp_path}/env')
    )
    assert (tmp_path / "given").read_text().startswith("--model-path m --dtype float32")
    assert (tmp_path / "given").read_text().endswith("--flag x\n")
    assert (tmp_path / "env").read_text() == "1\n"


def test_what_sglang_refuses_is_a_sentence(tmp_path: Path) -> None:
    refused = "echo usage: sglang >&2; echo 'sglang: error: argument --flag: invalid int value' >&2; exit 2"
    with pytest.raises(
        UserError, match=r"engine\.extra_args: SGLang refuses them \(argument --flag: invalid int value"
    ):
        check_flags(interpreter(tmp_path, refused))
    lacking = "echo Traceback >&2; echo \"ModuleNotFoundError: No module named 'sglang'\" >&2; exit 1"
    with pytest.raises(UserError, match=r"cannot be imported by .*python \(ModuleNotFoundError: .*set engine\.python"):
        check_flags(interpreter(tmp_path, lacking))


def test_a_parser_that_takes_too_long_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("collab_megatron.launch.engine_checks.PARSE_TIMEOUT_S", 0.1)
    check_flags(interpreter(tmp_path, "exec sleep 30"))
    assert "were not checked" in caplog.text


def test_a_port_is_refused_for_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use: end the process that listens"):
            check_engine(EngineSection(port=port))
    bind = socket.socket.bind

    def forbidden(self: socket.socket, address: tuple[str, int]) -> None:
        if address[1] == 80:
            raise PermissionError(errno.EACCES, "Permission denied")
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", forbidden)
    with pytest.raises(UserError, match=r"port 80 on 127\.0\.0\.1 cannot be used: Permission denied"):
        check_engine(EngineSection(port=80))


def test_a_context_longer_than_the_models_is_sglangs_to_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model_spec(HF)
    check_context_length(EngineSection(context_length=512), spec)
    with pytest.raises(UserError, match=r"engine\.context_length=513 is more than the 512 tokens"):
        check_context_length(EngineSection(context_length=513), spec)
    stretched = model_spec({**HF, "rope_parameters": {"rope_type": "linear", "factor": 4.0}})
    check_context_length(EngineSection(context_length=2048), stretched)
    check_context_length(EngineSection(context_length=513, urls=("http://a:1",)), spec)  # theirs to know
    monkeypatch.setenv(LONGER_CONTEXT, "1")
    check_context_length(EngineSection(context_length=513), spec)


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    check_folder("run.dir", tmp_path / "a" / "b" / "c")
    check_file("output", tmp_path / "a" / "b.json")
    check_folder("run.dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_nobody_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root writes everywhere, so the refusal is the file system's, made up."""

    def refuse(*, prefix: str, dir: Path) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("collab_megatron.launch.path_checks.tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"run\.dir=.* refused a new folder \(Read-only file system\); choose another"):
        check_folder("run.dir", tmp_path / "run")
