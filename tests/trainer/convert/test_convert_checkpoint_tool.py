"""tools/convert_checkpoint.py as a user runs it. Memory and interruption: test_convert_memory.py."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from collab_megatron.launch.ports import free_port
from collab_megatron.wire.checkpoints import complete_checkpoints, read_info, write_marker
from tests.trainer.convert.converter_ranks import LAYOUTS
from tests.trainer.parallel.ranks import REPO, Ran, run_ranks, run_script
from tests.trainer.parallel.tiny import make_model

RANKS = Path(__file__).parent / "converter_ranks.py"
TOOL = REPO / "tools" / "convert_checkpoint.py"


def convert(*args: str | Path, ranks: int = 1) -> Ran:
    """The tool by itself, or on as many ranks as torchrun would start."""
    return run_script(TOOL, *args, ranks=ranks)


def launch(*args: str | Path) -> Ran:
    """The tool as a command, which then starts its processes by itself."""
    command = [sys.executable, "-W", "ignore", str(TOOL), *map(str, args), "--processes", "2"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=REPO, env=env)
    return Ran(done.returncode, done.stdout, done.stderr)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def chunks(model_folder: Path) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """Every stored chunk of a distributed checkpoint, as its file has it."""
    found = {}
    for index, place in dcp.FileSystemReader(model_folder).read_metadata().storage_data.items():
        with (model_folder / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            found[index.fqn, tuple(index.offset)] = torch.load(io.BytesIO(stream.read(place.length)))
    return found


@pytest.mark.slow
def test_there_on_one_and_two_processes_and_back_is_exact(tmp_path: Path) -> None:
    models = []
    one, two = (functools.partial(convert, ranks=ranks) for ranks in (1, 2))
    for kind, dtype, load, export in (("qwen2", torch.bfloat16, launch, two), ("qwen3moe", torch.float32, one, one)):
        source = make_model(tmp_path / kind, kind, dtype=dtype)
        (source / "generation_config.json").write_text('{"temperature": 0.5}')
        output = tmp_path / f"{kind}-megatron"
        there = load("hf-to-megatron", "--hf-path", source, "--output", output)
        assert there.returncode == 0, there.stderr
        assert there.stdout.strip() == str(output / "step_00000000")
        run_ranks(RANKS, 1, "save", str(source), str(tmp_path / f"{kind}-saved"))
        _assert_same_checkpoint(output / "step_00000000", tmp_path / f"{kind}-saved" / "step_00000000")
        assert read_info(output / "step_00000000").extra == {"source": str(source)}
        back = export(
            *("megatron-to-hf", "--checkpoint", output, "--output", tmp_path / f"{kind}-back"),
            *("--max-shard-size", "60KB"),
        )
        assert back.returncode == 0, back.stderr
        assert same(weights(source), weights(tmp_path / f"{kind}-back"))
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (tmp_path / f"{kind}-back" / name).read_bytes() == (source / name).read_bytes()
        models.append(f"{source}={output}/step_00000000")
    # from several files and an index
    again = convert("hf-to-megatron", "--hf-path", tmp_path / "qwen2-back", "--output", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    _assert_same_checkpoint(tmp_path / "again" / "step_00000000", tmp_path / "qwen2-saved" / "step_00000000")
    said, _ = run_ranks(RANKS, 2, "load", ",".join(str(free_port()) for _ in LAYOUTS), *models)
    assert said.count("same qwen2") == 3
    assert said.count("same qwen3moe") == 3  # tensor parallelism only together with sequence parallelism


def _assert_same_checkpoint(made: Path, saved: Path) -> None:
    """`made` holds what training would have saved: the same chunks, bit for bit, and the other files."""
    old, new = chunks(saved / "model"), chunks(made / "model")
    assert same(old, new)
    old_common, new_common = (torch.load(folder / "model" / "common.pt") for folder in (saved, made))
    assert old_common == new_common
    assert (made / "model" / "metadata.json").read_bytes() == (saved / "model" / "metadata.json").read_bytes()
    assert read_info(made).layout == read_info(saved).layout


@pytest.mark.slow
def test_the_files_say_which_step_of_which_run(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama")
    run_ranks(RANKS, 1, "save", str(source), str(tmp_path / "run"))
    step = tmp_path / "run" / "step_00000007"
    (tmp_path / "run" / "step_00000000").rename(step)
    extra = {"config": {"run": {"dir": "runs/a", "name": "b"}}}
    write_marker(step, step=7, layout=read_info(step).layout, extra=extra)
    back = convert("megatron-to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    with safe_open(tmp_path / "back" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "7", "run": "runs/a", "name": "b"}


@pytest.mark.slow
def test_a_full_disk_or_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama")
    (tmp_path / "work").mkdir()
    run_ranks(RANKS, 1, "fail", str(source), str(tmp_path / "work"))


@pytest.mark.slow
def test_mistakes_cost_two_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "step_00000003").mkdir()
    for args, message in (
        (("megatron-to-hf", "--checkpoint", tmp_path, "--output", tmp_path / "x"), "holds none"),
        (("hf-to-megatron", "--hf-path", tmp_path, "--output", tmp_path / "x"), "config.json"),
        (("hf-to-megatron", "--hf-path", tmp_path, "--output", tmp_path / "x", "--processes", "0"), "--processes"),
    ):
        _refused(convert(*args), message)


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[name]

    return change


def _as(name: str, **how: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].to(**how) if how else tensors[name][:-1].contiguous()

    return change


def _ruined(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name][5] = torch.nan

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words", "start"),
    [
        (_without("model.norm.weight"), ["model.norm.weight", "[64]", "missing"], launch),
        (_as("model.norm.weight"), ["model.norm.weight", "[63]", "[64]", "model.safetensors"], None),
        (_as("model.norm.weight", dtype=torch.bfloat16), ["model.norm.weight", "BF16", "F32", "one dtype"], None),
        (_ruined("model.norm.weight"), ["model.norm.weight", "model.safetensors", "1 of 64 values", "NaN"], None),
    ],
    ids=["missing", "shape", "dtype", "nan"],
)
def test_a_wrong_tensor_of_a_folder_names_itself(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], words: list[str], start: Callable[..., Ran] | None
) -> None:
    source = make_model(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, source / "model.safetensors")
    start = start or functools.partial(convert, ranks=2)
    result = start("hf-to-megatron", "--hf-path", source, "--output", tmp_path / "x")
    _refused(result, *words)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_folder_or_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama")
    run_ranks(RANKS, 1, "save", str(source), str(tmp_path / "run"))
    step = complete_checkpoints(tmp_path / "run")[0]

    def back() -> Ran:
        return convert("megatron-to-hf", "--checkpoint", step, "--output", tmp_path / "x")

    config = json.loads((step / "hf" / "config.json").read_text())
    (step / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with _explained(tmp_path, "a config.json with a layer more", result := back()):
        _refused(result, "decoder.layers", "shape [2, ", "asks for [3, ", str(step / "model"))
    (step / "hf" / "config.json").write_text(json.dumps(config))
    file = step / "model" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    with _explained(tmp_path, f"half of {file.name}", result := back()):
        assert result.returncode == 1
        assert "cannot be read" in result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]
    cut = source / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 1000)
    result = convert("hf-to-megatron", "--hf-path", source, "--output", tmp_path / "y")
    with _explained(tmp_path, f"{cut.name} without its last 1,000 bytes", result):
        _refused(result, str(cut))
        shutil.rmtree(tmp_path / "run")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@contextlib.contextmanager
def _explained(folder: Path, case: str, result: Ran) -> Iterator[None]:
    """A failure inside names the case, all that the tool has said, and every file below `folder` with its size: this
    test has failed once and never again, on a machine that was busy."""
    try:
        yield
    except AssertionError as error:
        files = "\n".join(
            f"{path.stat().st_size:>10} {path.relative_to(folder)}"
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        )
        error.add_note(
            f"case: {case}, exit code {result.returncode}\nstdout: {result.stdout!r}\nstderr: {result.stderr!r}\n"
            f"{files}"
        )
        raise


def _refused(result: Ran, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
