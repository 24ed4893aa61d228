"""Table of an evaluation's figures. Pure: names and numbers in, lines out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PARTS = ("openings", "later")
RATES = {
    "mr": "reward",
    "clarify_rate": "asks",
    "clarify_rate_ambiguous": "asks if unclear",
    "clarify_rate_complete": "asks if clear",
}
NAME_WIDTH, WIDTH = 22, 12


def evaluation_table(figures: Mapping[str, float], metrics: Sequence[str]) -> list[str]:
    """Rows: metrics, reward, share of openings that ask, counts, LLM calls with dollars. A figure that was not measured
    has no row. Openings and later turns have columns of their own if both were played."""
    parts = [part for part in PARTS if f"{part}/conversations" in figures]
    lines = [_row("", ["all", *parts])] if parts else []
    for name, shown in {**{metric: metric for metric in metrics}, **RATES}.items():
        if name in figures:
            lines.append(_row(shown, [_number(figures, key, 3) for key in _keys(name, parts)]))
    for name, shown in {"conversations": "conversations", "conversations_failed": "of these failed"}.items():
        lines.append(_row(shown, [_number(figures, key, 0) for key in _keys(name, parts)]))
    for role in _roles(figures):
        count, usd = figures[f"simulator/{role}/answers"], figures[f"simulator/{role}/cost_usd"]
        replayed = figures[f"simulator/{role}/replayed"]
        again = f", {replayed:,.0f} from the journal" if replayed else ""
        lines.append(f"{f'{role} calls':{NAME_WIDTH}}{count:>{WIDTH},.0f}{'':4}${usd:,.4f}{again}")
    if figures.get("engine/turns_replayed"):
        lines.append(_row("turns from the journal", [_number(figures, "engine/turns_replayed", 0)]))
    if "wall_s" in figures:
        lines.append(_row("seconds", [_number(figures, "wall_s", 1)]))
    return lines


def _keys(name: str, parts: Sequence[str]) -> list[str]:
    return [name, *(f"{part}/{name}" for part in parts)]


def _roles(figures: Mapping[str, float]) -> list[str]:
    """Roles that an LLM API played, from the figures simulator/ROLE/answers."""
    names = (name.split("/") for name in figures)
    return [parts[1] for parts in names if len(parts) == 3 and (parts[0], parts[2]) == ("simulator", "answers")]


def _number(figures: Mapping[str, float], name: str, digits: int) -> str:
    return f"{figures[name]:,.{digits}f}" if name in figures else ""


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:{NAME_WIDTH}}{''.join(f'{cell:>{WIDTH}}' for cell in cells)}".rstrip()
