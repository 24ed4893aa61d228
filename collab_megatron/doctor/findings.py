"""What a check found: ok, warn or fail, with the way out; and how all of it is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from collab_megatron.errors import RunError, UserError, masked

Level = Literal["ok", "warn", "fail"]
EXIT_WARNINGS = 0
EXIT_FAILURES = 1
NAME_WIDTH = 16


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Example: Finding("warn", "shared memory", "/dev/shm has 64 MB free", "start the container with --shm-size 8g")
    """

    level: Level
    name: str  # of the check
    text: str  # what was found
    way_out: str = ""  # what to do; only an ok needs none

    def __str__(self) -> str:
        line = f"{self.level:4s}  {self.name:{NAME_WIDTH}s}  {masked(' '.join(self.text.split()))}"
        return line + (f"\n{'':{8 + NAME_WIDTH}s}-> {masked(self.way_out)}" if self.way_out else "")


Check = Callable[[], Iterable[Finding]]


def findings_of(name: str, check: Check) -> list[Finding]:
    """The findings of a check. An error is a finding: the doctor goes on with the next check."""
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)  # one by one: what was found before an error stays
    except (UserError, RunError) as error:
        found.append(from_error(name, error))
    except Exception as error:  # noqa: BLE001  (a broken environment raises anything, and the other checks must run)
        text = f"the check ended with {type(error).__name__}: {error}"
        found.append(Finding("fail", name, text, "see the text; if it does not help, report it as a bug"))
    return found


def from_error(name: str, error: UserError | RunError) -> Finding:
    what, to_do = split_sentence(str(error))
    return Finding("fail", name, what, to_do or "see docs/install.md")


def split_sentence(text: str) -> tuple[str, str]:
    """What happened and what to do, which errors and warnings of this project say in one sentence.

    Example: "port 1 is in use: set engine.port=0" and "url: nothing answers there; start that server"
    """
    what, separator, to_do = text.rpartition(": ")
    if "; " in to_do:  # the part after the colon says what happened too
        what, separator, to_do = text.rpartition("; ")
    return (what, to_do) if separator else (text, "")


def summary(found: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in found) for level in ("ok", "warn", "fail")}
    return ", ".join(f"{count} {level}" for level, count in counts.items())


def exit_code(found: Sequence[Finding]) -> int:
    """0 without a failure; warnings do not count."""
    return EXIT_FAILURES if any(finding.level == "fail" for finding in found) else EXIT_WARNINGS
