"""Rows of the table of bad inputs: paths that a run reads or writes, and the user's own metric modules and prompts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.config.table import Row, World

Prepare = Callable[[Path, World], object]


def file(name: str, content: bytes = b"x") -> Prepare:
    def prepare(own: Path, world: World) -> None:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(content)

    return prepare


def folder(name: str) -> Prepare:
    return lambda own, world: (own / name).mkdir(parents=True)


def place(name: str, override: str, *says: str, prepare: Prepare | None = None, program: str = "train_rl") -> Row:
    return Row(name, program, (override,), (override.split("=")[0], *says), prepare=prepare)


def _other_database(own: Path, world: World) -> None:
    with closing(sqlite3.connect(own / "other.sqlite")) as connection:
        connection.execute("CREATE TABLE t (a)")


RUN = [
    place("run-dir-is-a-file", "run.dir=DIR/f", "is a file", "choose another", prepare=file("f")),
    place("run-dir-below-a-file", "run.dir=DIR/f/run", "is a file", "choose another", prepare=file("f")),
    place("run-dir-in-proc", "run.dir=/proc/x", "is not writable", "choose another"),
    place("run-dir-empty", 'run.dir=""', "empty"),
    place("run-dir-nul", 'run.dir="a\\0b"', "NUL"),
    place("run-dir-over-long", "run.dir=" + "a" * 300, "too long"),
    place("init-from-over-long", "run.init_from=" + "a" * 300, "too long"),
    place("data-over-long", "data.train=" + "a" * 300, "too long"),
    place("data-list-over-long", "data.train=[" + "a/" * 3000 + "]", "too long"),
    place("build-tokenizer-over-long", "tokenizer=" + "a" * 300, "too long", program="build"),
    place("sft-run-dir-is-a-file", "run.dir=DIR/f", "is a file", prepare=file("f"), program="train_sft"),
    place("evaluate-run-dir-is-a-file", "run.dir=DIR/f", "is a file", prepare=file("f"), program="evaluate"),
    Row("logs-is-a-file", "train_rl", (), ("run/logs", "is a file"), prepare=file("run/logs")),
    Row("checkpoints-is-a-file", "train_rl", (), ("run/checkpoints", "is a file"), prepare=file("run/checkpoints")),
    Row("tensorboard-is-a-file", "train_rl", (), ("tensorboard/run", "is a file"), prepare=file("run/tensorboard/run")),
    place("run-name-slash", "run.name=a/b", "a/b", "letters"),
    place("run-name-dots", "run.name=..", "'..'", "letters"),
    place("run-name-dot", "run.name=.", "letters"),
    place("run-name-nul", 'run.name="a\\0b"', "NUL"),
    place("run-name-newline", 'run.name="a\\nb"', "letters"),
    place("run-name-empty", 'run.name=""', "letters"),
    place("run-name-long", "run.name=" + "a" * 300, "100"),
    place("run-name-dash", "run.name=-rf", "letters"),
    place("sft-run-name-slash", "run.name=a/b", "letters", program="train_sft"),
    place("evaluate-run-name-slash", "run.name=a/b", "letters", program="evaluate"),
    place("init-from-missing", "run.init_from=DIR/none", "checkpoint", "name"),
    place("init-from-is-a-file", "run.init_from=DIR/f", "checkpoint", prepare=file("f")),
    place("init-from-nul", 'run.init_from="a\\0b"', "NUL"),
    place("disk-dir-is-a-file", "sync.disk_dir=DIR/f", "is a file", prepare=file("f")),
]

JOURNAL = [
    place("journal-is-a-folder", "journal.path=DIR", "folder", "file"),
    place("journal-below-a-file", "journal.path=DIR/f/j.sqlite", "is a file", prepare=file("f")),
    place("journal-in-proc", "journal.path=/proc/x/j.sqlite", "is not writable"),
    place("journal-no-sqlite", "journal.path=DIR/f", "SQLite", "move it away", prepare=file("f", b"x" * 5000)),
    place("journal-other-database", "journal.path=DIR/other.sqlite", "not a journal", prepare=_other_database),
    place("journal-nul", 'journal.path="a\\0b"', "NUL"),
    place("journal-empty", 'journal.path=""', "empty"),
    place("journal-only-without-one", "journal.replay=only", "no journal", "journal.path"),
    place("evaluate-journal-in-proc", "journal.path=/proc/x/j.sqlite", "is not writable", program="evaluate"),
    Row(
        "journal-default-no-sqlite", "train_rl", (), ("SQLite", "journal.path"), prepare=file("run/journal/run.sqlite")
    ),
    place("build-journal-in-proc", "journal.path=/proc/x/j.sqlite", "is not writable", program="build"),
]


def data(name: str, override: str, *says: str, prepare: Prepare | None = None, program: str = "train_rl") -> Row:
    """A file of rows: the sentence names the file."""
    return Row(name, program, (override,), says, prepare=prepare)


DATA = [
    data("data-missing", "data.train=DIR/none.parquet", "none.parquet", "prepare_dataset"),
    data("data-is-a-folder", "data.train=DIR", "no file", "prepare_dataset"),
    data("data-no-parquet", "data.train=DIR/f", "/f ", "parquet", prepare=file("f")),
    place("data-empty-list", "data.train=[]", "name a file"),
    place("data-twice", "data.train=[WORLD/train.parquet, WORLD/train.parquet]", "twice"),
    place("data-nul", 'data.train="a\\0b"', "NUL"),
    place("data-blank", 'data.train=""', "empty"),
    data("data-of-sft", "data.train=WORLD/sft.parquet", "column", "prepare_dataset"),
    data("validation-missing", "data.validation=DIR/none.parquet", "none.parquet", "prepare_dataset"),
    data("sft-data-of-rl", "data.train=WORLD/train.parquet", "column", "prepare_dataset", program="train_sft"),
    data("dpo-data-of-sft", "data.train=WORLD/sft.parquet", "column", "--dataset-type dpo", program="train_dpo"),
    data("dpo-data-missing", "data.train=DIR/none.parquet", "none.parquet", program="train_dpo"),
    data("sft-data-missing", "data.train=DIR/none.parquet", "none.parquet", program="train_sft"),
    place("problems-missing", "problems=DIR/none.jsonl", "none.jsonl", program="build"),
    data("problems-no-json", "problems=DIR/p.jsonl", "line 1", prepare=file("p.jsonl", b"{"), program="build"),
    data("problems-list", "problems=DIR/p.jsonl", "p.jsonl", prepare=file("p.jsonl", b"[1]\n"), program="build"),
    data("problems-empty", "problems=DIR/p.jsonl", "p.jsonl", prepare=file("p.jsonl", b""), program="build"),
    data("problems-not-utf8", "problems=DIR/p.jsonl", "p.jsonl", prepare=file("p.jsonl", b"\xff\n"), program="build"),
    data("problems-deep", "problems=DIR/p.jsonl", "p.jsonl", prepare=file("p.jsonl", b"[" * 99999), program="build"),
    data("problems-folder", "problems=DIR", ".parquet", "name another", program="build"),
    data("problems-csv", "problems=DIR/p.csv", "name must end", prepare=file("p.csv", b"a,b"), program="build"),
    place("problems-split-of-a-file", "problems_split=[test]", "without splits", program="build"),
    Row(
        "mapping-column",
        "build",
        ("mapping={single_turn_prompt: $task, single_turn_completion: $single_turn_completion}",),
        ("problem 1", "'task'", "its columns are single_turn_prompt"),
    ),
    Row(
        "mapping-where",
        "build",
        (
            "mapping={single_turn_prompt: $single_turn_prompt, single_turn_completion: $single_turn_completion, "
            "where: {level: hard}}",
        ),
        ("'level'", "which no row has"),
    ),
    place("build-model-missing", "model={path: DIR/none}", "simulators.assistant.model", program="build"),
    place("build-tokenizer-missing", "tokenizer=DIR/none", "tokenizer", program="build"),
    place("build-output-is-a-file", "output=DIR/f", "is a file", prepare=file("f"), program="build"),
]

OUTPUTS = [
    place(
        "export-hf-is-a-file", "export_hf=DIR/f", "is a file", "choose another", prepare=file("f"), program="train_sft"
    ),
    place("export-hf-below-a-file", "export_hf=DIR/f/hf", "is a file", prepare=file("f"), program="train_sft"),
    place("export-hf-not-empty", "export_hf=DIR/hf", "not empty", prepare=file("hf/a"), program="train_sft"),
    place("export-hf-in-proc", "export_hf=/proc/x/hf", "is not writable", program="train_sft"),
    place("export-hf-nul", 'export_hf="a\\0b"', "NUL", program="train_sft"),
    place("output-is-a-folder", "output=DIR/o", "folder", "name a file", prepare=folder("o"), program="evaluate"),
    place("output-below-a-file", "output=DIR/f/o.json", "is a file", prepare=file("f"), program="evaluate"),
    place("output-jsonl", "output=DIR/o.jsonl", ".json file", program="evaluate"),
    place("output-in-proc", "output=/proc/x/o.json", "is not writable", program="evaluate"),
]

PROMPTS = [
    place("prompt-file-missing", "simulators.user.prompt_file=DIR/none.txt", "none.txt"),
    place("prompt-file-is-a-folder", "simulators.user.prompt_file=DIR", "cannot be read"),
    place("prompt-file-not-utf8", "simulators.user.prompt_file=DIR/p.txt", "utf-8", prepare=file("p.txt", b"\xff")),
    data("prompt-file-empty", "simulators.user.prompt_file=DIR/p.txt", "p.txt", "$chat", prepare=file("p.txt", b"")),
    data(
        "prompt-file-lone-dollar",
        "simulators.user.prompt_file=DIR/p.txt",
        "p.txt",
        "$$",
        prepare=file("p.txt", b"5 $ $chat"),
    ),
    data(
        "prompt-file-unknown-name",
        "simulators.user.prompt_file=DIR/p.txt",
        "p.txt",
        "$qqq",
        prepare=file("p.txt", b"$chat $request $qqq"),
    ),
    place("prompt-file-nul", 'simulators.user.prompt_file="a\\0b"', "NUL"),
    place("judge-prompt-file-missing", "simulators.judge.prompt_file=DIR/none.txt", "none.txt"),
    place("unused-prompt-file-missing", "reward.accuracy_prompt_file=DIR/none.txt", "none.txt"),
    Row(
        "mixture-prompt-file-missing",
        "train_rl",
        ("simulators.user.mixture=[{model: hosted_vllm/m, api_key_env: null, prompt_file: DIR/none.txt}]",),
        ("simulators.user.mixture.0.prompt_file", "none.txt"),
    ),
    Row(
        "unused-judge-prompt-file-missing",
        "train_rl",
        ("reward.metric_weights={accuracy: 1}", "simulators.judge.prompt_file=DIR/none.txt"),
        ("simulators.judge.prompt_file", "none.txt"),
    ),
    place("evaluate-prompt-file-missing", "simulators.user.prompt_file=DIR/none.txt", "none.txt", program="evaluate"),
    place("build-prompt-file-missing", "simulators.user.prompt_file=DIR/none.txt", "none.txt", program="build"),
    place(
        "assistant-prompt-file-missing", "simulators.assistant.prompt_file=DIR/none.txt", "none.txt", program="build"
    ),
]


def module(name: str, entry: str, *says: str, content: bytes | None = None) -> Row:
    prepare = None if content is None else file("own_metric.py", content)
    return Row(
        name, "train_rl", (f"reward.metric_modules=[{entry}]",), ("reward.metric_modules", *says), prepare=prepare
    )


OWN = "DIR/own_metric.py"
MODULES = [
    module("module-relative", "'.x'", ".x", "give a name that Python can import"),
    module("module-relative-parent", "'..x'", "..x", "give a name that Python can import"),
    module("module-empty", "''", "give a name that Python can import"),
    module("module-with-a-slash", "a/b", "a/b", "give a name that Python can import"),
    module("module-two-dots", "a..b", "a..b", "give a name that Python can import"),
    module("module-nul", '"a\\0b"', "NUL"),
    module("module-number", "5", "string"),
    module("module-missing", "no_such_module", "no_such_module", "give a module"),
    module("module-file-missing", "DIR/none.py", "none.py", "give a module"),
    module("module-syntax", OWN, "own_metric.py", "line 1", content=b"def :\n"),
    module("module-raises", OWN, "own_metric.py", "ZeroDivisionError", "line 2", content=b"a = 1\na / 0\n"),
    module("module-exits", OWN, "own_metric.py", "SystemExit", content=b"raise SystemExit(0)\n"),
    module("module-not-utf8", OWN, "own_metric.py", content=b"a = '\xff'\n"),
    module("module-nul-byte", OWN, "own_metric.py", content=b"a = '\0'\n"),
    module("module-imports-nothing", OWN, "own_metric.py", "no_such_thing", content=b"import no_such_thing\n"),
    module(
        "module-takes-a-name",
        OWN,
        "own_metric.py",
        "already registered",
        content=b"from collab_megatron.rollout.rewards import register_metric\n"
        b"register_metric('accuracy')(lambda context: None)\n",
    ),
]

ROWS = (*RUN, *JOURNAL, *DATA, *OUTPUTS, *PROMPTS, *MODULES)
