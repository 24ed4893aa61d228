"""The table of bad inputs: what a row is, and how its command is run: main() in this process, through run_cli.

A row changes one thing of a command that is sound. In its arguments and files DIR stands for a folder of its own, BASE
for the sound config of its program, WORLD for the sound files that all rows share. Every command that can is given
--dry-run, which makes the checks of a start and starts nothing.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from collab_megatron.errors import EXIT_USER, run_cli

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d \S+ \S+: ")  # log.py's; a message has none
OWN_FOLDER = re.compile(r"[^\s=]*/pytest-[^/\s]*/(popen-\w+/)?[^/\s]*(?=/|\b)")  # pytest's, of a worker or not
SHORTEST, LONGEST = 30, 700  # characters of a sentence: what, which value, what to do

MODULES = {
    "train_rl": "collab_megatron.train_rl",
    "train_sft": "collab_megatron.train_sft",
    "train_dpo": "collab_megatron.train_dpo",
    "evaluate": "collab_megatron.evaluate",
    "build": "tools.build_dataset",
    "prepare": "tools.prepare_dataset",
    "convert": "tools.convert_checkpoint",
    "check_export": "tools.check_export",
    "plot": "tools.plot_curves",
    "demo": "tools.demo",
    "show": "collab_megatron.rollout.journal.show",
    "demo_model": "collab_megatron.demo.tiny_model",
    "demo_tasks": "collab_megatron.demo.task_files",
    "endpoint": "collab_megatron.demo.endpoint",
}
WITH_CONFIG = ("train_rl", "train_sft", "train_dpo", "evaluate", "build")


@dataclass(frozen=True)
class Row:
    """One bad input.

    Example: Row("bool-lr", "train_rl", ("optimizer.lr=yes",), ("optimizer.lr", "number"))
    """

    name: str  # of the test
    program: str  # a key of MODULES
    args: tuple[str, ...]  # overrides or flags
    says: tuple[str, ...]  # pieces of the sentence: the key or file, what is wrong, what to do
    prepare: Callable[[Path, World], object] | None = None  # makes the row's files in its folder
    config: str | bytes | None = None  # a config file in the place of the sound one
    code: int = EXIT_USER


@dataclass(frozen=True)
class World:
    """The sound files."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def config_of(self, program: str) -> Path:
        return self.folder / f"{program}.yaml"


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        """The lines on stderr but for those of the log."""
        return [line for line in self.err.splitlines() if line.strip() and not LOG_LINE.match(line)]


def command_of(row: Row, world: World, own: Path) -> list[str]:
    """The arguments of the row's program, its files written."""
    own.mkdir(parents=True, exist_ok=True)
    if row.prepare is not None:
        row.prepare(own, world)

    def filled(text: str) -> str:
        base = str(world.config_of(row.program))
        return text.replace("DIR", str(own)).replace("BASE", base).replace("WORLD", str(world.folder))

    args = [filled(arg) for arg in row.args]
    if row.program not in WITH_CONFIG:
        return args
    config = world.config_of(row.program)
    if row.config is not None:
        config = own / "own.yaml"
        config.write_bytes(row.config if isinstance(row.config, bytes) else filled(row.config).encode())
    places = [f"output={own / 'output'}"] if row.program == "build" else [f"run.dir={own / 'run'}"]
    given = {arg.split("=")[0] for arg in args}
    sound = [place for place in places if place.split("=")[0] not in given]
    argv = [str(config), "--dry-run"]
    if args and args[0].startswith("CONFIG="):
        argv[0] = args.pop(0).removeprefix("CONFIG=")
    return [*argv, *(sound if row.config is None else []), *args]


def run_here(program: str, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Said:
    """`python -m MODULE ARGV` without a new process."""
    return run_main(importlib.import_module(MODULES[program]).main, [program, *argv], capsys)


def run_main(main: Callable[[], None], argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Said:
    """A command without a new process. argv: its name first."""
    capsys.readouterr()
    code = 0
    with _as_it_was(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(argv))
        try:
            run_cli(main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    said = capsys.readouterr()
    return Said(code, said.out, said.err)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """What an entry point changes in its process is put back."""
    environ = dict(os.environ)
    path = list(sys.path)
    handlers = list(logging.getLogger().handlers)
    level = logging.getLogger().level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environ)


def require_one_sentence(row: Row, said: Said) -> None:
    """The documented exit code, one line, no traceback; the line names what the row wants named."""
    assert "Traceback" not in said.err + said.out, said.err[-3000:]
    assert said.code == row.code, f"exit code {said.code}: {said.err[-600:] or said.out[-600:]}"
    sentences = said.sentences
    if row.program not in WITH_CONFIG or sentences[0].startswith("usage: "):
        sentences = [line for line in sentences if "error: " in line]  # argparse prints its usage first
    assert len(sentences) == 1, said.err
    (sentence,) = sentences
    assert sentence.startswith("error: ") or ": error: " in sentence, sentence
    told = OWN_FOLDER.sub("TMP", sentence)  # its numbers would stand in for those that a row wants
    for piece in row.says:
        assert piece.lower() in told.lower(), f"{piece!r} is not in: {sentence}"
    assert SHORTEST < len(sentence) < LONGEST, sentence
