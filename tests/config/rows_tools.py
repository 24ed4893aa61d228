"""Rows of the table of bad inputs: flags and files of the tools and of journal.show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.config.rows_places import _other_database, file, folder
from tests.config.table import Row, World

Prepare = Callable[[Path, World], object]


def row(name: str, program: str, args: str, *says: str, prepare: Prepare | None = None) -> Row:
    return Row(name, program, tuple(args.split()), says, prepare=prepare)


def _probe(content: object) -> Prepare:
    return file("probe.json", content if isinstance(content, bytes) else json.dumps(content).encode())


def _torn_checkpoint(own: Path, world: World) -> None:
    (own / "step_00000001").mkdir()
    (own / "step_00000001" / "complete.json").write_text('{"format": 2}')


def _whole_checkpoint(own: Path, world: World) -> None:
    """As far as its marker."""
    (own / "step_00000001").mkdir()
    marker = {"format": 2, "step": 1, "extra": {}, "layout": {}}
    (own / "step_00000001" / "complete.json").write_text(json.dumps(marker))


COMMAND_LINE = [
    row("no-arguments", "show", "", "file"),
    Row("gpus-nonsense", "train_rl", ("--gpus", "lots"), ("--gpus lots", "8x80")),
    Row("gpus-zero", "train_rl", ("--gpus", "0x80"), ("--gpus 0x80", "8x80")),
    Row("gpus-huge", "train_rl", ("--gpus", "1" + "0" * 5000 + "x80"), ("--gpus",)),
    Row("nodes-zero", "train_rl", ("--nodes", "0"), ("--nodes 0", "between 1 and")),
    Row("nodes-and-hosts", "train_rl", ("--nodes", "2", "--hosts", "a,b"), ("--nodes and --hosts", "leave one")),
    Row("hosts-nonsense", "train_rl", ("--hosts", "a[3-1]"), ("--hosts", "'3-1'", "gpu[001-064]:8")),
    Row("hosts-twice", "train_sft", ("--hosts", "a,b,a"), ("--hosts names a twice", "once")),
    Row("hosts-evaluate", "evaluate", ("--hosts", "a,b"), ("one node", "leave --nodes and --hosts out")),
    Row(
        "nodes-too-few",
        "train_rl",
        ("--gpus", "2x80", "--nodes", "2", "parallel.device=cuda", "parallel.data=4"),
        ("4 trainer ranks and 1 engine ranks", "4 GPUs", "ask for 3 nodes", "parallel.data=3"),
    ),
    Row("gpus-too-few", "train_rl", ("--gpus", "1x80", "parallel.device=cuda"), ("2 GPUs", "lower")),
    Row("unknown-flag", "train_rl", ("--drry-run",), ("--drry-run",)),
    Row("unknown-flag-sft", "train_sft", ("--resume",), ("--resume",)),
    Row("unknown-flag-build", "build", ("--resume",), ("--resume",)),
]

SHOW = [
    row("show-a-folder", "show", "DIR", "is a folder", "name"),
    row("show-nothing", "show", "DIR/none.sqlite", "no journal", "journal.path"),
    row("show-no-sqlite", "show", "DIR/f", "SQLite", prepare=file("f", b"x" * 5000)),
    row("show-an-empty-file", "show", "DIR/f", "not a journal", prepare=file("f", b"")),
    row("show-other-database", "show", "DIR/other.sqlite", "not a journal", prepare=_other_database),
    Row("show-nul", "show", ("a\0b",), ("no journal",)),
]

PREPARE = [
    row("prepare-no-dataset", "prepare", "--dataset DIR/none.jsonl --dataset-type rl --output DIR/o", "none.jsonl"),
    row(
        "prepare-empty-folder",
        "prepare",
        "--dataset DIR/d --dataset-type rl --output DIR/o",
        "holds no",
        prepare=folder("d"),
    ),
    row(
        "prepare-bad-json",
        "prepare",
        "--dataset DIR/d.jsonl --dataset-type rl --output DIR/o",
        "line 1",
        prepare=file("d.jsonl", b"{"),
    ),
    row(
        "prepare-json-object",
        "prepare",
        "--dataset DIR/d.json --dataset-type rl --output DIR/o",
        "list of rows",
        prepare=file("d.json", b"{}"),
    ),
    row(
        "prepare-json-numbers",
        "prepare",
        "--dataset DIR/d.json --dataset-type rl --output DIR/o",
        "d.json",
        prepare=file("d.json", b"[1]"),
    ),
    row(
        "prepare-deep-json",
        "prepare",
        "--dataset DIR/d.json --dataset-type rl --output DIR/o",
        "d.json",
        prepare=file("d.json", b"[" * 99999),
    ),
    row(
        "prepare-no-parquet",
        "prepare",
        "--dataset DIR/d.parquet --dataset-type rl --output DIR/o",
        "d.parquet",
        prepare=file("d.parquet"),
    ),
    row(
        "prepare-other-suffix",
        "prepare",
        "--dataset DIR/d.csv --dataset-type rl --output DIR/o",
        ".jsonl",
        prepare=file("d.csv"),
    ),
    row(
        "prepare-split-of-a-file",
        "prepare",
        "--dataset DIR/d.jsonl --dataset-type rl --output DIR/o --split test",
        "--split",
        prepare=file("d.jsonl", b""),
    ),
    row("prepare-metric-for-rl", "prepare", "--dataset a --dataset-type rl --output DIR/o --metric m", "--metric"),
    row(
        "prepare-threshold-alone", "prepare", "--dataset a --dataset-type sft --output DIR/o --threshold 1", "--metric"
    ),
    row(
        "prepare-share-nan",
        "prepare",
        "--dataset WORLD/problems.jsonl --dataset-type rl --output DIR/o --validation-share nan",
        "--validation-share",
    ),
    row(
        "prepare-share-2",
        "prepare",
        "--dataset WORLD/problems.jsonl --dataset-type rl --output DIR/o --validation-share 2",
        "--validation-share",
    ),
    row(
        "prepare-share-text",
        "prepare",
        "--dataset a --dataset-type rl --output DIR/o --validation-share x",
        "--validation-share",
    ),
    row(
        "prepare-rows-0",
        "prepare",
        "--dataset WORLD/problems.jsonl --dataset-type rl --output DIR/o --max-rows 0",
        "--max-rows",
    ),
    row("prepare-type", "prepare", "--dataset a --dataset-type ppo --output DIR/o", "--dataset-type", "ppo"),
    row(
        "prepare-gap-for-rl", "prepare", "--dataset a --dataset-type rl --output DIR/o --minimum-gap 1", "--minimum-gap"
    ),
    row(
        "prepare-gap-nan",
        "prepare",
        "--dataset a --dataset-type dpo --output DIR/o --minimum-gap nan",
        "--minimum-gap nan",
    ),
    row(
        "prepare-no-tokenizer",
        "prepare",
        "--dataset a --dataset-type rl --output DIR/o --max-tokens 5",
        "--max-tokens",
        "--tokenizer",
    ),
    row(
        "prepare-tokenizer-missing",
        "prepare",
        "--dataset a --dataset-type rl --output DIR/o --tokenizer DIR",
        "tokenizer",
    ),
    row(
        "prepare-output-is-a-file",
        "prepare",
        "--dataset WORLD/problems.jsonl --dataset-type rl --output DIR/f",
        "--output",
        "is a file",
        prepare=file("f"),
    ),
]

CONVERT = [
    row("convert-no-model", "convert", "hf-to-megatron --hf-path /none --output DIR/o", "/none", "folder"),
    row("convert-a-file", "convert", "hf-to-megatron --hf-path WORLD/train.parquet --output DIR/o", "train.parquet"),
    row("convert-not-a-model", "convert", "hf-to-megatron --hf-path DIR --output DIR/o", "config.json"),
    row(
        "convert-output-there",
        "convert",
        "hf-to-megatron --hf-path WORLD/model --output DIR/o",
        "exists already",
        prepare=file("o/a"),
    ),
    row(
        "convert-output-is-a-file",
        "convert",
        "hf-to-megatron --hf-path WORLD/model --output DIR/o",
        "exists already",
        prepare=file("o"),
    ),
    row(
        "convert-output-below-a-file",
        "convert",
        "hf-to-megatron --hf-path WORLD/model --output DIR/f/o",
        "is a file",
        prepare=file("f"),
    ),
    row(
        "convert-processes-0",
        "convert",
        "hf-to-megatron --hf-path WORLD/model --output DIR/o --processes 0",
        "--processes",
    ),
    row(
        "convert-processes-text",
        "convert",
        "hf-to-megatron --hf-path WORLD/model --output DIR/o --processes x",
        "--processes",
    ),
    row("convert-no-checkpoint", "convert", "megatron-to-hf --checkpoint DIR/none --output DIR/o", "checkpoint"),
    row(
        "convert-file-as-checkpoint",
        "convert",
        "megatron-to-hf --checkpoint DIR/f --output DIR/o",
        "checkpoint",
        prepare=file("f"),
    ),
    row(
        "convert-torn-checkpoint",
        "convert",
        "megatron-to-hf --checkpoint DIR/step_00000001 --output DIR/o",
        "complete",
        prepare=_torn_checkpoint,
    ),
    row("convert-no-best", "convert", "megatron-to-hf --checkpoint DIR --output DIR/o --best", "best.json", "--best"),
    row(
        "convert-shard-size",
        "convert",
        "megatron-to-hf --checkpoint DIR/step_00000001 --output DIR/o --max-shard-size huge",
        "huge",
        "5GB",
        prepare=_whole_checkpoint,
    ),
    row("convert-command", "convert", "hf-to-mars", "hf-to-mars"),
]

REST = [
    row("probe-missing", "check_export", "--hf WORLD/model --probe DIR/none.json", "none.json", "train_rl"),
    row("probe-no-json", "check_export", "--hf WORLD/model --probe DIR/probe.json", "probe.json", prepare=_probe(b"{")),
    row("probe-list", "check_export", "--hf WORLD/model --probe DIR/probe.json", "probe.json", prepare=_probe([])),
    row(
        "probe-without-rows",
        "check_export",
        "--hf WORLD/model --probe DIR/probe.json",
        "probe.json",
        prepare=_probe({}),
    ),
    row("probe-is-a-folder", "check_export", "--hf WORLD/model --probe DIR", "probe"),
    row(
        "export-missing",
        "check_export",
        "--hf DIR/none --probe DIR/probe.json",
        "none",
        prepare=_probe({"dtype": "float32", "rows": [{"input_ids": [1], "output_ids": [2], "logprobs": [-1.0]}]}),
    ),
    row("plot-nothing", "plot", "--run-dir DIR --output DIR/o.png", "metrics.jsonl", "make demo"),
    row("demo-model-there", "demo_model", "--output DIR", "exists already"),
    row("demo-model-seed", "demo_model", "--output DIR/m --seed -1" + "0" * 30, "--seed"),
    row("demo-tasks-none", "demo_tasks", "--output DIR/t --train 0", "1 to"),
    row("demo-tasks-many", "demo_tasks", "--output DIR/t --heldout 1000000000", "1 to"),
    row("demo-tasks-on-a-file", "demo_tasks", "--output DIR/f", "is a file", prepare=file("f")),
    row("endpoint-port", "endpoint", "--port 99999", "99999", "--port"),
    row("endpoint-port-negative", "endpoint", "--port -1", "-1", "--port"),
    row("endpoint-host", "endpoint", "--host no-such-host.invalid", "no-such-host.invalid", "--host"),
    row("endpoint-host-over-long", "endpoint", "--host " + "a" * 300, "--host"),
    row("endpoint-ready-file", "endpoint", "--ready-file DIR/none/f", "--ready-file"),
    row("demo-seed", "demo", "--seed x", "--seed"),
    row("demo-run-dir-is-a-file", "demo", "--run-dir DIR/f", "is a file", prepare=file("f")),
]

ROWS = (*COMMAND_LINE, *SHOW, *PREPARE, *CONVERT, *REST)
