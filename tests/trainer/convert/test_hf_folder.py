"""A written model folder is complete or does not exist."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from collab_megatron.errors import RunError, UserError
from collab_megatron.trainer.convert.hf_folder import parse_size, write_hf_folder
from tests.trainer.parallel.tiny import make_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_model(tmp_path / "source", "llama")


def stream(source: Path) -> Iterator[tuple[str, Tensor]]:
    yield from load_file(source / "model.safetensors").items()


def test_shards_index_and_companions(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "deep" / "output"
    write_hf_folder(stream(source), source, output, max_shard_size="100KB", metadata={"step": "7"})
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 1
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for _, t in stream(source))
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "7"}
    assert (output / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert (output / "chat_template.jinja").is_file()
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    ids = torch.arange(12)[None]
    old, new = (AutoModelForCausalLM.from_pretrained(f) for f in (source, output))
    assert torch.equal(old(ids).logits, new(ids).logits)


def test_one_shard_has_the_plain_name(tmp_path: Path, source: Path) -> None:
    write_hf_folder(stream(source), source, tmp_path / "output")
    assert [f.name for f in (tmp_path / "output").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_nothing_half_written_remains(tmp_path: Path, source: Path, error: BaseException, raised: type) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from list(stream(source))[:5]
        raise error

    with pytest.raises(raised):
        write_hf_folder(broken(), source, tmp_path / "output", max_shard_size="10KB")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path, source: Path) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    dead, running = (tmp_path / f".out.tmp-{pid}" for pid in (int(gone.stdout), os.getppid()))
    for folder in (dead, running):
        folder.mkdir()
        (folder / "shard-0").touch()
    write_hf_folder(stream(source), source, tmp_path / "out")
    assert (dead.exists(), running.exists()) == (False, True)


def test_an_output_that_holds_something_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        write_hf_folder(stream(source), source, source)


def test_sizes() -> None:
    assert (parse_size("5GB"), parse_size("200mb"), parse_size(12)) == (5 * 10**9, 200 * 10**6, 12)
    for bad in ("5 apples", "0", "-1GB"):
        with pytest.raises(UserError, match="not a size"):
            parse_size(bad)
