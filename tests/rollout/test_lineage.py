"""What makes a run another run to the journal: contents, prompts, settings that shape conversations, the version."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import UserError
from collab_megatron.files import CHUNK_BYTES, contents
from collab_megatron.rollout import lineage as lineage_module
from collab_megatron.rollout.clients import open_journal
from collab_megatron.rollout.lineage import lineage_of, model_fingerprint
from collab_megatron.rollout.llm.templates import shipped_prompts
from collab_megatron.wire.checkpoints import step_folder, write_marker

METRIC = "from collab_megatron.rollout.rewards import register_metric\nA = 1\n"


def write_weights(path: Path, values: bytes, name: str = "w") -> None:
    header = json.dumps({name: {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)


def write_checkpoint(folder: Path, step: int, values: bytes) -> None:
    model = step_folder(folder / "first", step) / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "metadata.json").write_text("{}")
    (model / "__0_0.distcp").write_bytes(values)
    write_marker(model.parent, step=step, layout={}, extra={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config with everything that it names next to it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "chat_template.jinja").write_text("one")
    write_weights(tmp_path / "model" / "model.safetensors", bytes(200_000))
    (tmp_path / "train.parquet").write_bytes(b"rows")
    (tmp_path / "more.parquet").write_bytes(b"more rows")
    (tmp_path / "held.parquet").write_bytes(b"held out")
    (tmp_path / "user.txt").write_text("one $request $chat")
    (tmp_path / "accuracy.txt").write_text("one $request $reference $chat")
    (tmp_path / "my_metric.py").write_text(METRIC)
    write_checkpoint(tmp_path, 3, bytes(200_000))
    raw = {
        "run": {"dir": str(tmp_path / "run"), "init_from": str(tmp_path / "first")},
        "model": {"path": str(tmp_path / "model")},
        "data": {
            "train": [str(tmp_path / "train.parquet"), str(tmp_path / "more.parquet")],
            "validation": str(tmp_path / "held.parquet"),
        },
        "simulators": {
            "user": {"model": "u", "prompt_file": str(tmp_path / "user.txt"), "mixture": [{"model": "v"}]},
            "judge": {"model": "j"},
        },
        "reward": {"metric_modules": ["my_metric"], "accuracy_prompt_file": str(tmp_path / "accuracy.txt")},
    }
    (tmp_path / "rl.yaml").write_text(json.dumps(raw))
    return tmp_path


def load(folder: Path, *overrides: str) -> RLConfig:
    return load_config(RLConfig, folder / "rl.yaml", overrides)


def delivered(config: RLConfig) -> bytes | None:
    with closing(open_journal(config)) as journal:
        return journal.delivered(0, 3)


@pytest.fixture
def kept(folder: Path) -> Path:
    """The folder after a batch of step 3 was delivered."""
    config = load(folder)
    with closing(open_journal(config)) as journal:
        journal.record_delivery(0, 3, b"a batch")
    assert delivered(config) == b"a batch"
    return folder


CONTENTS: dict[str, Callable[[Path], Any]] = {
    "data": lambda folder: (folder / "train.parquet").write_bytes(b"rowS"),
    "second data file": lambda folder: (folder / "more.parquet").write_bytes(b"more rowS"),
    "weights of equal size": lambda folder: write_weights(folder / "model" / "model.safetensors", bytes([1]) * 200_000),
    "names of weights": lambda folder: write_weights(folder / "model" / "model.safetensors", bytes(200_000), "v"),
    "weights of init_from": lambda folder: write_checkpoint(folder, 3, bytes([1]) * 200_000),
    "a newer checkpoint in init_from": lambda folder: write_checkpoint(folder, 4, bytes([1]) * 200_000),
    "another weight file": lambda folder: write_weights(folder / "model" / "more.safetensors", b"0"),
    "model config": lambda folder: (folder / "model" / "config.json").write_text('{"a": 1}'),
    "tokenizer": lambda folder: (folder / "model" / "tokenizer.json").write_text('{"a": 1}'),
    "chat template": lambda folder: (folder / "model" / "chat_template.jinja").write_text("two"),
    "user prompt": lambda folder: (folder / "user.txt").write_text("two $request $chat"),
    "accuracy prompt": lambda folder: (folder / "accuracy.txt").write_text("two $request $reference $chat"),
    "metric module": lambda folder: (folder / "my_metric.py").write_text(METRIC.replace("1", "2")),
}


@pytest.mark.parametrize("change", CONTENTS)
def test_changed_contents_at_the_same_path_are_another_run(change: str, kept: Path) -> None:
    config = load(kept)
    CONTENTS[change](kept)
    assert delivered(config) is None


def test_a_changed_shipped_prompt_or_version_is_another_run(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(kept)
    assert {path.stem for path in shipped_prompts()} >= {"user", "judge_accuracy", "judge_interactivity"}
    (tmp_path / "shipped").mkdir()
    copies = []
    for prompt in shipped_prompts():
        copies.append(tmp_path / "shipped" / prompt.name)
        copies[-1].write_text(prompt.read_text())
    monkeypatch.setattr(lineage_module, "shipped_prompts", lambda: copies)
    assert delivered(config) == b"a batch"
    copies[-1].write_text(copies[-1].read_text() + "Be strict.")
    assert delivered(config) is None
    monkeypatch.undo()
    monkeypatch.setattr(lineage_module, "__version__", "999")
    assert delivered(config) is None


@pytest.mark.parametrize(
    "override",
    [
        "simulators.user.max_tokens=7",
        "simulators.user.temperature=0.3",
        "simulators.user.response_format=json_schema",
        "simulators.user.mixture=[{model: w}]",
        "simulators.judge.max_tokens=7",
        "rollout.max_new_tokens=7",
        "rollout.inexact_template=as_sampled",
        "reward.metric_weights={accuracy: 2}",
        "reward.settings={accuracy: {a: 1}}",
        "algorithm.kl_coef=0.5",
        "optimizer.lr=1",
        "driver.refill_groups=1",
        "engine.context_length=512",
        "engine.extra_args=[--quantization, fp8]",
        "model.dtype=float32",
        "run.seed=2",
        "simulators.user.prompt_file=null",
    ],
)
def test_settings_that_shape_conversations_or_weights_are_another_run(override: str, kept: Path) -> None:
    assert delivered(load(kept, override)) is None


@pytest.mark.parametrize(
    "override",
    [
        "run.resume=true",
        "simulators.user.api_base=http://127.0.0.1:1/v1",
        "simulators.judge.max_concurrency=3",
        "simulators.user.mixture=[{model: v, timeout_s: 9}]",
        "simulators.health={min_replies: 5}",
        "driver.group_timeout_s=5000",
        "driver.max_restarts=9",
        "engine.count=3",
        "train.steps=7",
        "train.save_interval=5",
        "evaluation.num_tasks=5",
        "budget.hard_calls=5",
        "parallel.data=2",
        "data.validation=null",
    ],
)
def test_where_and_how_fast_is_the_same_run(override: str, kept: Path) -> None:
    assert delivered(load(kept, override, "train.eval_interval=0")) == b"a batch"


def test_paths_do_not_count(kept: Path, tmp_path: Path) -> None:
    before = lineage_of(load(kept))
    (kept / "model").rename(tmp_path / "model-moved")
    (kept / "user.txt").rename(tmp_path / "user-moved.txt")
    moved = load(
        kept, f"model.path={tmp_path / 'model-moved'}", f"simulators.user.prompt_file={tmp_path / 'user-moved.txt'}"
    )
    assert lineage_of(moved) == before


def test_a_prompt_of_the_user_is_none_of_the_judge(folder: Path) -> None:
    prompt = folder / "user.txt"
    of_user = load(folder)
    of_judge = load(folder, "simulators.user.prompt_file=null", f"simulators.judge.prompt_file={prompt}")
    assert lineage_of(of_user) != lineage_of(of_judge)


def test_a_long_schedule_counts_its_length(folder: Path) -> None:
    decaying = ("optimizer.schedule=cosine", "optimizer.warmup_steps=1")
    assert lineage_of(load(folder, *decaying, "train.steps=7")) != lineage_of(load(folder, *decaying))


def test_a_large_file_is_hashed_in_chunks_in_order(tmp_path: Path) -> None:
    """Every chunk counts, and so does their order. 48 MB take a fraction of a second."""
    file = tmp_path / "large"
    parts = [bytes([number]) * CHUNK_BYTES for number in range(3)]
    file.write_bytes(b"".join(parts))
    before = time.monotonic()
    whole = contents(file)
    assert time.monotonic() - before < 10
    assert (
        whole == hashlib.blake2b(b"".join(hashlib.sha256(part).digest() for part in parts), digest_size=8).hexdigest()
    )
    file.write_bytes(b"".join(reversed(parts)))
    assert contents(file) != whole


def test_weights_are_not_read_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "huge.safetensors").open("wb") as huge:
        huge.write(struct.pack("<Q", 2) + b"{}")
        huge.truncate(40 * 2**30)  # a sparse file: 40 GB to look at, nothing on disk
    before = time.monotonic()
    assert set(model_fingerprint(tmp_path)) == {"huge.safetensors"}
    assert time.monotonic() - before < 5


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    (folder / "more.parquet").unlink()
    with pytest.raises(UserError, match=r"more\.parquet cannot be read \(No such file"):
        lineage_of(load(folder))
