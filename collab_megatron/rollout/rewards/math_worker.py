"""Worker process that compares mathematical expressions with math-verify; a script, without imports of this package.

One JSON line in: [reference, answer]. One line out: equal, different or unknown. `different` is given for two numbers
only; whatever else is not equal may be the same thing in another form, which a judge can tell.

The texts come from models, and sympy may compute for hours on a short one. So comparisons are made in a child process
with a memory limit, and each has an alarm that ends it. The next child is a fork of this process, which has imported
sympy (two seconds) and computes nothing. Both end with their standard input, and this one with a child that dies of
anything else.
"""

from __future__ import annotations

import json
import logging
import os
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
    status = -signal.SIGALRM
    while status == -signal.SIGALRM:
        child = os.fork()
        if child == 0:
            serve(timeout_s)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == -signal.SIGALRM:  # it runs only during a comparison, which has no answer yet
            print("unknown", flush=True)


def serve(timeout_s: float) -> None:
    """Answer until the input or the time of a comparison ends."""
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
