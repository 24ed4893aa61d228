"""Ask another Python interpreter, such as engine.python, by running a few lines in it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What the interpreter printed; `reason` is the last line of its stderr."""

    code: int
    output: str
    reason: str


def ask_interpreter(
    python: str, program: str, *arguments: str, env: Mapping[str, str], timeout_s: float
) -> Answer | None:
    """Run `python -c program arguments`; None if it does not end in time. Raises OSError if it cannot be started."""
    command: Sequence[str] = [python, "-c", program, *arguments]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    return Answer(done.returncode, done.stdout, lines[-1].strip())
