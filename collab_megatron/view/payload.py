"""The data of the page: an index that is there at once, and the trees in compressed blocks that are read when opened.

    index     one JSON object: runs, sources, metrics, and the list's rows as columns; ASCII, without < > &
    blocks    BLOCK_BYTES of trees each (compact.py) as JSON, zlib, base64; the browser inflates them itself
    words     token id -> text of one run's tokenizer, in a block of the same kind

At 5,000 trees the index has some MB and the first paint needs nothing else.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.view.compact import compact_tree, objects
from collab_megatron.view.rows import row_of_tree
from collab_megatron.view.sources import Source

FORM = 1
"""Of the payload: the script refuses another one."""
BLOCK_BYTES = 2**18
MOST_SHOWN_STEPS = 20  # of an error message
# characters that could end the script element or begin a comment in it, as JSON escapes them
_FOR_HTML = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


@dataclass(frozen=True)
class Payload:
    """What page.py puts into the file."""

    index: str  # JSON that is safe inside a script element
    blocks: tuple[str, ...]  # base64
    words: tuple[str, ...]  # base64, one per run
    trees: int
    left_out: int  # trees over the limit


@dataclass
class PayloadBuilder:
    """Collects trees one at a time, so that memory holds one block and the compressed rest."""

    max_trees: int
    steps: tuple[int, ...] = ()  # only these; empty: all
    runs: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _blocks: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)
    _open_bytes: int = 0
    _prompts: dict[str, int] = field(default_factory=dict)  # equal prompts have one number, in both runs
    _ids: list[set[int]] = field(default_factory=list)  # token ids of each run
    _seen: set[int] = field(default_factory=set)  # all steps there are

    def add_run(self, name: str, sources: Iterable[Source]) -> None:
        """All trees of a run. Raises UserError for a damaged line."""
        run = len(self.runs)
        self.runs.append(name)
        self._ids.append(set())
        for source in sources:
            self.sources.append({"run": run, "name": source.name, "held_out": source.held_out})
            for tree in source.trees():
                self._add(tree, run, len(self.sources) - 1)

    def _add(self, tree: Mapping[str, Any], run: int, source: int) -> None:
        row = row_of_tree(tree)
        if isinstance(row["step"], int):
            self._seen.add(row["step"])
        if self.steps and row["step"] not in self.steps:
            return
        if len(self._rows) >= self.max_trees:
            self.left_out += 1
            return
        short = compact_tree(tree)
        for reply in short["r"]:
            self._ids[run].update(reply["ids"], *(turn["ids"] for future in reply["f"] for turn in future["tu"]))
        row |= {"run": run, "source": source, "prompt": self._prompt(tree)}
        self._rows.append({**row, "block": len(self._blocks), "at": len(self._open)})
        self._open.append(_json(short))
        self._open_bytes += len(self._open[-1])
        if self._open_bytes >= BLOCK_BYTES:
            self._close_block()

    def _prompt(self, tree: Mapping[str, Any]) -> int:
        """A number for the task and the chat so far, by which the same prompt is found at other steps and runs."""
        chat = [[item.get("role"), item.get("content")] for item in objects(tree.get("prompt"))]
        return self._prompts.setdefault(json.dumps([tree.get("task_id"), chat]), len(self._prompts))

    def _close_block(self) -> None:
        self._blocks.append(packed("[" + ",".join(self._open) + "]"))
        self._open, self._open_bytes = [], 0

    def token_ids(self, run: int) -> set[int]:
        """All ids that the trees of a run hold."""
        return self._ids[run]

    def finish(self, words: Sequence[Mapping[int, str]]) -> Payload:
        """The payload. words: for each run the text of its token ids. Raises UserError where a step has no tree."""
        if missing := [step for step in self.steps if step not in self._seen]:
            known = sorted(self._seen)
            more = f" and {len(known) - MOST_SHOWN_STEPS} more" if len(known) > MOST_SHOWN_STEPS else ""
            listed = ", ".join(map(str, known[:MOST_SHOWN_STEPS])) or "none"
            raise UserError(f"--steps names step {missing[0]}, of which no tree is there: choose from {listed}{more}")
        if self._open:
            self._close_block()
        metrics = sorted({name for row in self._rows for name in row["metrics"]})
        names = [name for name in self._rows[0] if name != "metrics"] if self._rows else []
        index = {
            "form": FORM,
            "runs": self.runs,
            "sources": self.sources,
            "steps": list(self.steps),
            "left_out": self.left_out,
            "metrics": metrics,
            "columns": {name: [row[name] for row in self._rows] for name in names},
            # by metric, in the order of `metrics`
            "scores": [[row["metrics"].get(name) for row in self._rows] for name in metrics],
        }
        return Payload(
            index=for_html(_json(index)),
            blocks=tuple(self._blocks),
            words=tuple(packed(_json({str(token): said for token, said in each.items()})) for each in words),
            trees=len(self._rows),
            left_out=self.left_out,
        )


def for_html(ascii_json: str) -> str:
    """The same JSON value without the characters that mean something to an HTML parser."""
    return ascii_json.translate(_FOR_HTML)


def packed(ascii_json: str) -> str:
    """JSON as zlib and base64: no character of it means anything to an HTML parser."""
    return base64.b64encode(zlib.compress(ascii_json.encode("ascii"), 6)).decode("ascii")


def _json(value: Any) -> str:
    """ASCII, so that bidirectional controls and half surrogates of a text stand in the file as escapes only."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
