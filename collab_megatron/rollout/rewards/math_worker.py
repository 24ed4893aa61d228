"""Worker process that compares mathematical expressions with math-verify; a script, without imports of this package.

One JSON line in: [reference, answer]. One line out: equal, different or unknown. `different` is given for two numbers
only; whatever else is not equal may be the same thing in another form, which a judge can tell.

The texts come from models, and sympy may compute for hours on a short one. So each comparison has an alarm that ends
the process, and the process has a memory limit. It ends with its standard input.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from typing import Any


def compare(reference: str, answer: str) -> str:
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[Any]:
        found: list[Any] = parse(
            rf"\boxed{{{text}}}",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        return found

    wanted, given = read(reference), read(answer)
    if not wanted or not given:
        return "unknown"
    if verify(wanted, given, timeout_seconds=None):
        return "equal"
    return "different" if _is_number(wanted[0]) and _is_number(given[0]) else "unknown"


def _is_number(value: object) -> bool:
    return bool(getattr(value, "is_number", False)) and not getattr(value, "is_Relational", False)


def main(timeout_s: float, memory_mb: int) -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns about the time-outs that this process replaces
    compare("1", "1")  # imports
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    print("ready", flush=True)
    for line in sys.stdin:
        reference, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            verdict = compare(reference, answer)
        except Exception:  # noqa: BLE001 - sympy raises anything on odd input; the judge decides then
            verdict = "unknown"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
