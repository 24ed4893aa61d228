"""RUN_DIR/conversations/NAME: the lines of record_lines.py in files of bounded size, in the order of steps.

    shard0.jsonl                        shard 0 appends here
    shard0.00000001-00000040.jsonl.zst  steps 1 to 40, closed at PART_BYTES; record.compress sets the compression

All lines of a step are appended at once, to one file. A driver that was killed during the write removes the torn step
at its next start; a resumed run removes the steps that it will run again.
"""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from collab_megatron.config.sections import RecordSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.json_lines import append_lines, replace_lines, row_of

PART_BYTES = 64 * 2**20
"""A file is closed above this size. The record of a demo stays one plain file."""
ZSTD_LEVEL = 3
_STEP = re.compile(rb'\{"schema":\d+,"step":(\d+),')
_PART = re.compile(r"shard(\d+)\.(\d{8})-(\d{8})\.jsonl(\.zst)?")


@dataclass(frozen=True)
class _Part:
    """A closed file."""

    path: Path
    first: int  # its steps lie in [first, last]
    last: int


class RecordWriter:
    """Writes the record files of one shard. Raises RunError when the disk refuses."""

    def __init__(
        self, folder: Path, section: RecordSection, *, first_step: int | None, shard: int = 0, shards: int = 1
    ) -> None:
        """first_step: the first step that will be run again, counted from 1; None: no step will."""
        self._folder, self._section = folder, section
        self._open = folder / f"shard{shard}.jsonl"
        self._name = f"shard{shard}"
        self._limit_bytes = None if section.max_mb is None else section.max_mb * 1e6 / shards
        self._reported_full = False
        self._first = self._newest = 0  # first step of the open file, newest of the record; 0: none
        self._doubtful = 0  # the newest step, if it may be incomplete
        folder.mkdir(parents=True, exist_ok=True)
        self._parts, twice = _parts(folder, shard)
        try:
            for path in twice:
                path.unlink()
            self._cut(first_step)
        except OSError as error:
            raise self._refused(error) from None

    def wants(self, step: int) -> bool:
        """Whether to write the trees of `step`. A batch that is delivered again is not written again, and
        `record.every` skips steps."""
        return (step > self._newest or step == self._doubtful) and (step - 1) % self._section.every == 0

    def write(self, step: int, lines: Sequence[bytes]) -> str:
        """Write the trees of `step` if `wants` is true. Returns a note for the user once the record is full."""
        if not self.wants(step):
            return ""
        try:
            if step == self._doubtful:
                self._cut(step)
            size = sum(map(len, lines))
            if self._limit_bytes is not None and self._bytes() + size > self._limit_bytes:
                return self._full(step)
            append_lines(self._open, b"".join(lines))
            self._first = self._first or step
            self._newest = step
            if self._open.stat().st_size > PART_BYTES:
                self._close_part()
        except OSError as error:
            raise self._refused(error) from None
        return ""

    def _full(self, step: int) -> str:
        if self._reported_full:
            return ""
        self._reported_full = True
        return (
            f"{self._folder} has reached record.max_mb={self._section.max_mb:g}: no conversations are written from "
            f"step {step} on; raise it, or set record.every"
        )

    def _bytes(self) -> int:
        """Size of the shard's files on disk."""
        files = [self._open, *(part.path for part in self._parts)]
        return sum(file.stat().st_size for file in files if file.exists())

    def _close_part(self) -> None:
        """Turn the open file into a closed one. A kill in between leaves two copies; `_cut` removes one."""
        self._parts.append(self._published(self._open.open("rb"), self._first, self._newest))
        self._open.unlink()
        self._first = 0

    def _published(self, content: BinaryIO, first: int, last: int) -> _Part:
        """Write a closed file to a temporary name, then rename it."""
        compressed = self._section.compress == "zstd"
        path = self._folder / f"{self._name}.{first:08d}-{last:08d}.jsonl{'.zst' * compressed}"
        with content:
            if compressed:
                replace_lines(path, zstandard.ZstdCompressor(level=ZSTD_LEVEL).read_to_iter(content))
            else:
                replace_lines(path, content)
        return _Part(path, first, last)

    def _cut(self, first_step: int | None) -> None:
        """Remove the steps from `first_step` on, and a torn step."""
        for aside in self._folder.glob(f"{self._name}.*.tmp"):
            aside.unlink()
        if first_step is not None:
            for part in [part for part in self._parts if part.last >= first_step]:
                self._parts.remove(part)
                self._shorten(part, first_step)
        newest = max((part.last for part in self._parts), default=0)
        self._first, self._newest, self._doubtful = 0, newest, 0
        if not self._open.exists():
            return
        steps, torn = set(), False
        with self._open.open("rb") as old:
            for line in old:
                torn = not line.endswith(b"\n")
                steps.add(_step_of(line))
        cut = {_step_of(line)} if torn else set()
        kept = {step for step in steps - cut if newest < step and (first_step is None or step < first_step)}
        if torn or kept != steps:
            with self._open.open("rb") as old:
                replace_lines(self._open, (line for line in old if _step_of(line) in kept))
        self._first, self._newest = min(kept, default=0), max(kept, default=newest)
        if cut == {0}:  # the torn line is of the newest step or of the next
            self._doubtful = max(kept, default=0)

    def _shorten(self, part: _Part, first_step: int) -> None:
        """Rewrite a closed file without the steps from `first_step` on. After a kill both are there; see `_parts`."""
        kept = [line for line in _lines(part.path) if _step_of(line) < first_step]
        if kept:
            first, last = _step_of(kept[0]), _step_of(kept[-1])
            self._parts.append(self._published(io.BytesIO(b"".join(kept)), first, last))
        part.path.unlink()

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"the driver cannot write to {self._folder}: {error.strerror}; free some space, or set record.max_mb"
        )


def read_trees(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of a run's record in order of steps, of each step shard by shard. An unfinished last line is skipped.

    Raises UserError for a damaged line."""
    shards = sorted({int(path.name[len("shard") :].split(".")[0]) for path in folder.glob("shard*.jsonl*")})
    return heapq.merge(*(_trees_of(folder, shard) for shard in shards), key=lambda tree: tree["step"])


def _trees_of(folder: Path, shard: int) -> Iterator[dict[str, Any]]:
    for path in [*(part.path for part in _parts(folder, shard)[0]), folder / f"shard{shard}.jsonl"]:
        if path.exists():
            yield from read_lines(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The trees of one file, as `read_trees`."""
    for number, line in enumerate(_lines(path), start=1):
        if line.endswith(b"\n"):
            yield row_of(line, path, number, numbers=("step",))


def steps_of(text: str, key: str) -> range:
    """`7`, `5-20` or `5-`. Raises UserError that names `key` for another form."""
    found = re.fullmatch(r"(\d+)(-(\d*))?", text)
    if found is None:
        raise UserError(f"{key} {text!r} is no step or range of steps: write 7, 5-20 or 5-")
    first = int(found[1])
    last = first if found[2] is None else int(found[3]) if found[3] else 2**31
    return range(first, last + 1)


def whole_steps(folder: Path, shards: int) -> int:
    """The newest step whose trees are there whole, of all shards; 0 without one. Reads the open files only."""
    newest = []
    for shard in range(shards):
        parts = [part.last for part in _parts(folder, shard)[0]]
        file = folder / f"shard{shard}.jsonl"
        steps, torn = [max(parts, default=0)], False
        for line in _lines(file) if file.exists() else ():
            torn = not line.endswith(b"\n")
            steps.append(_step_of(line))
        newest.append(max(0, max(steps) - 1) if torn else max(steps))
    return min(newest)


def _parts(folder: Path, shard: int) -> tuple[list[_Part], list[Path]]:
    """The closed files of a shard in order of steps, and superseded files that a kill in `_shorten` left. Of two files
    with the same first step the shorter one is newer."""
    found: dict[int, _Part] = {}
    twice = []
    for path in folder.glob(f"shard{shard}.*-*.jsonl*"):
        if name := _PART.fullmatch(path.name):
            part = _Part(path, int(name[2]), int(name[3]))
            other = found.get(part.first)
            if other is not None:
                part, longer = sorted((part, other), key=lambda part: part.last)
                twice.append(longer.path)
            found[part.first] = part
    return [found[first] for first in sorted(found)], twice


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        if path.suffix == ".zst":
            with zstandard.ZstdDecompressor().stream_reader(file) as content:
                yield from io.BufferedReader(content)
        else:
            yield from file


def _step_of(line: bytes) -> int:
    """The step of a line; 0 if the line is torn before its step."""
    found = _STEP.match(line)
    return int(found[1]) if found else 0
