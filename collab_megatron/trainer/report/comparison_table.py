"""The table of an evaluation as text: for the terminal, and as Markdown. Pure: plain values in, text out.

Shares are shown times 100, as in the paper's tables. A star marks a figure whose difference to the baseline on the same
tasks has an interval without 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

SHARES = ("accuracy", "interactivity", "bleu_score", "pass_rate", "judge", "asks_if_unclear", "asks_if_clear")
SHOWN = {
    "interactivity": "ITR",
    "tokens_k": "tokens (k)",
    "mr": "reward",
    "asks_if_unclear": "asks if unclear",
    "asks_if_clear": "asks if clear",
}
STAR = "*"
Plain = Mapping[str, Any]


def heading(table: Plain) -> list[str]:
    """Names of the columns."""
    figures = [f"{SHOWN.get(name, name)}{' %' if name in SHARES else ''}" for name in table["columns"]]
    wins = ["wins %"] if any(row["wins"] for row in table["rows"]) else []
    return ["model", "user", "conversations", *figures, *wins, "LLM calls", "dollars"]


def cells(table: Plain) -> list[list[str]]:
    """Each row as texts, in the order of `heading`."""
    judged = any(row["wins"] for row in table["rows"])
    found = []
    for row in table["rows"]:
        failed = f" ({row['failed']} failed)" if row["failed"] else ""
        texts = [row["model"], row["user"], f"{row['conversations']:,}{failed}"]
        texts += [_figure(name, row) for name in table["columns"]]
        if judged:
            texts.append(_wins(row["wins"]))
        replayed = f" +{row['replayed']:,}" if row["replayed"] else ""
        found.append([*texts, f"{row['calls']:,}{replayed}", f"{row['cost_usd']:,.4f}"])
    return found


def notes(table: Plain) -> list[str]:
    """What the reader of the table must know."""
    share = f"{100 * table['confidence']:g}"
    lines = [f"in brackets: {share} % bootstrap intervals over the requests ({table['resamples']:,} resamples)"]
    if any(row["difference"] for row in table["rows"]):
        lines.append(
            f"{STAR} differs from {table['baseline']} with the same user on the same tasks: the {share} % interval of "
            "the difference does not contain 0"
        )
    if any(row["wins"] for row in table["rows"]):
        lines.append(
            f"wins: share of tasks on which the judge prefers the model to {table['baseline']}; a tie is a half"
        )
    if any(row["replayed"] for row in table["rows"]):
        lines.append("+N LLM calls: answers from the journal, which cost nothing now")
    return lines


def markdown(table: Plain) -> str:
    """A Markdown document with the table and its notes."""
    names = heading(table)
    lines = [_line(names), _line(["---"] * 2 + ["---:"] * (len(names) - 2)), *(_line(row) for row in cells(table))]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(table)), ""])


def rich_table(table: Plain) -> Table:
    """The same for the terminal."""
    shown = Table(title="held-out conversations", caption="\n".join(notes(table)), caption_justify="left")
    for number, name in enumerate(heading(table)):
        shown.add_column(name, justify="left" if number < 2 else "right")
    for row in cells(table):
        shown.add_row(*row)
    return shown


def _figure(name: str, row: Plain) -> str:
    value = row["figures"].get(name)
    if value is None:
        return "-"
    change = row["difference"].get(name)
    differs = change is not None and change["low"] is not None and (change["low"] > 0 or change["high"] < 0)
    return _interval(name, value) + (STAR if differs else "")


def _interval(name: str, value: Plain) -> str:
    scale, digits = (100, 1) if name in SHARES else (1, 3)
    if value["low"] is None:
        return f"{scale * value['mean']:.{digits}f}"
    low, high = scale * value["low"], scale * value["high"]
    return f"{scale * value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _wins(wins: Plain | None) -> str:
    if wins is None or wins["rate"] is None:
        return "-"
    return _interval("accuracy", wins["rate"])


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
