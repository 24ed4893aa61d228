"""The two kinds of ending that are not success, and the one place that turns them into an exit code.

UserError: something the user can mend (config, data, key, layout, server address). Exit code 2.
RunError: something broke while running (a server died, a disk filled up). Exit code 1; 3 where the budget is spent, 130
where a signal asked for the end.
Both carry one sentence that says what happened and what to do; entry points print it without a traceback. Whatever
quotes a URL is masked before it can reach a terminal, a log or a record.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

EXIT_RUN = 1
EXIT_USER = 2
EXIT_BUDGET = 3
EXIT_DEFECT = 70  # of a process that is started again: an exception that nobody expected (EX_SOFTWARE of sysexits.h)
EXIT_INTERRUPTED = 130


MASK = "***"
_IN_URL = re.compile(
    r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]{0,30}://)"
    r"(?:[^\s/?#]*"  # name and password before the host, as URLs are read: up to the last @
    r"|[^\s/?#@:]*:(?!\d+[/?#])[^\s@]*)@"  # a password that holds / ? or #, which should have been %2F and so on
)
_IN_QUERY = re.compile(
    r"(?P<name>[?&;](?:[a-z0-9_.-]*[_.-])?(?:key|apikey|token|secret|password|passwd|pwd|sig|signature|credential)=)"
    r"[^\s&#'\"]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text without the passwords (and names) of the URLs in it, nor the keys in their queries."""
    if "://" not in text:
        return text
    return _IN_QUERY.sub(rf"\g<name>{MASK}", _IN_URL.sub(rf"\g<scheme>{MASK}@", text))


class UserError(ValueError):
    """A mistake of the user; the message, which is masked, says how to correct it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class RunError(RuntimeError):
    """A failure of the run; the message, which is masked, names rank, phase and peer where there are any."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class NoEngineLeft(RunError):
    """Every engine is dead, hung or not yet synced: the run can go on once one is back."""


class EvaluationFailed(RunError):
    """Most of an evaluation's conversations failed; the message has the counts. The trainer's state is well."""


class WeightsDiffer(RunError):
    """An engine does not serve the trainer's weights: training on what it samples would be silently wrong."""


class DiskFull(RunError):
    """A write met a full disk or quota."""


class RunStops(RunError):
    """Nothing broke, but the run must not go on; it saves a checkpoint first."""


class BudgetSpent(RunStops):
    """The LLM APIs have cost what the config allows."""


class SimulatorSick(RunStops):
    """Too many of a simulator's replies are odd: what it says would teach the wrong thing."""


class TooManyErrors(RunStops):
    """More futures of a step met an exception that nobody foresaw than the config allows: a bug, not bad luck."""


class GradientsNotFinite(RunStops):
    """Too many optimizer steps in a row had to be skipped: nothing is learned any more."""


class WeightsNotFinite(RunError):
    """An update left weights that are NaN or infinite: nothing may be made of them, no checkpoint either."""


class Interrupted(RunStops):
    """A signal asked the process to end."""


def exit_code(error: RunError) -> int:
    return EXIT_BUDGET if isinstance(error, BudgetSpent) else EXIT_RUN


def _one_line(error: Exception) -> str:
    """The message, whatever line ends a value or another library's text brought into it."""
    return " ".join(filter(None, map(str.strip, str(error).splitlines())))


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point and leave the process with 0, 1 (RunError), 2 (UserError), 3 (BudgetSpent) or 130 (a signal).

    Any other exception keeps its traceback, masked: it is a bug of ours, not news for the user.
    """
    sys.excepthook = _print_masked
    try:
        main()
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)  # the process that sent the signal tells the user
    except RunError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def run_rank(main: Callable[[], None]) -> NoReturn:
    """Run what a trainer rank does, and leave the process with the exit code of run_cli; exit handlers run before.

    The interpreter is not finalized. While it is, CPython before 3.14 ends a daemon thread that returns from native
    code with pthread_exit; where that code is pybind11's (torch's stores and process groups) the thread unwinds through
    a destructor that may not, and the process aborts: "terminate called without an active exception", exit code 134
    instead of the one the launcher reads.
    """
    code = EXIT_RUN
    try:
        run_cli(main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_RUN
    except BaseException as error:  # noqa: BLE001 - printed as the interpreter would
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _print_masked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
