"""Reads what the parts of tools/gpu_check.py leave, pytest's XML or a tool's JSON: figures and one line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


@dataclass(frozen=True)
class Reading:
    """What a part found."""

    summary: str  # one line, for the table
    figures: Any = field(default_factory=dict)  # for gpu_check.json
    nothing_ran: bool = False  # every test was skipped


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def pytest_xml(path: Path) -> Reading:
    """pytest's --junitxml: counts, seconds of each test, why tests failed or were skipped."""
    rows = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        row = {"test": case.get("name", ""), "result": "passed", "seconds": float(case.get("time", "0"))}
        for kind, result in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            found = case.find(kind)
            if found is not None:
                row |= {"result": result, "why": _last_line(found.get("message") or found.text or "")}
        rows.append(row)
    counts = Counter(str(row["result"]) for row in rows)
    parts = [f"{counts[result]} {result}" for result in ("passed", "failed", "skipped") if counts[result]]
    summary = ", ".join(parts) or "no test was found"
    if failed := [str(row["test"]) for row in rows if row["result"] == "failed"]:
        summary += f": {', '.join(failed)}"
    elif counts["skipped"]:
        summary += f" ({'; '.join(sorted({str(row['why']) for row in rows if row['result'] == 'skipped'}))})"
    return Reading(summary, rows, nothing_ran=bool(rows) and counts["skipped"] == len(rows))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def environment(path: Path) -> Reading:
    found: Mapping[str, Any] = load(path)
    packages = found["packages"]
    named = ("torch", "megatron-core", "sglang", "transformer-engine")
    line = [f"Python {found['python']}", *(f"{name} {packages.get(name, 'missing')}" for name in named)]
    if "torch" in found:
        line += [device["name"] for device in found["torch"]["devices"]]
    if "speed" in found:
        line.append(f"{found['speed']['matmul_tflops']:.3g} TFLOP/s, {found['speed']['copy_tb_per_s']:.2g} TB/s")
    if attention := found.get("packed_attention"):
        if "failed" in attention:
            said = f": {attention['failed']}"
        else:
            said = f" differs by {attention['differs']:.2%} (bound {attention['bound']:.0%})"
        line.append("attention over a packed row" + said)
    return Reading(", ".join(line), found)


def train_step(path: Path) -> Reading:
    """tools/bench/train_step.py: MFU where the device's peak is known, else tokens per second."""
    rows: Sequence[Mapping[str, Any]] = load(path)
    cells = []
    for row in rows:
        if "skipped" in row:
            cells.append(f"{row['phase']} {row['skipped']}")
            continue
        speed = f"MFU {row['mfu']:.1%}" if "mfu" in row else f"{row['tokens_per_s']:,.0f} tokens/s"
        ratio = f" ({row['ratio']:.2f} x transformers)" if "ratio" in row else " (alone)"
        cells.append(f"{row['phase']} {speed}{ratio}")
    return Reading(f"{rows[0]['shape'] if rows else 'nothing'}: {', '.join(cells)}", rows)


def head(path: Path) -> Reading:
    """tools/bench/logprobs.py."""
    found: Mapping[str, Any] = load(path)
    cells = [
        f"{row['variant']} {row['forward_s'] * 1e3:.1f} + {(row['forward_backward_s'] - row['forward_s']) * 1e3:.1f} ms"
        f" {row['peak_mib']:,.0f} MiB"
        for row in found["rows"]
    ]
    return Reading("; ".join(cells), found)


def weight_sync(path: Path) -> Reading:
    """tools/bench/weight_sync.py."""
    rows: Sequence[Mapping[str, Any]] = load(path)
    cells = [
        f"{row['shape']} {row['transport']} "
        + (row["skipped"] if "skipped" in row else f"{row['seconds']:.3f} s, floor {row['floor_seconds']:.3f} s")
        for row in rows
    ]
    return Reading("; ".join(cells), rows, nothing_ran=bool(rows) and all("skipped" in row for row in rows))


def rl_steps(path: Path) -> Reading:
    """tools/gpu/rl_steps.py."""
    found: Mapping[str, Any] = load(path)
    return Reading(
        f"{found['steps']:g} steps of {found.get('step_s', 0.0):.1f} s, reward {found['reward_first']:.3f} to "
        f"{found['reward_last']:.3f}, probe gap at most {found['probe_gap_max']:.4f}, log-prob gap "
        f"{found['logprob_gap_max']:.4f}, {found['checked']:g} checksums a sync",
        found,
    )
