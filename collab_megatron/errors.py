"""Errors that end a run, and their exit codes.

UserError: the user can fix it (config, data, key, layout, server address). Exit code 2.
RunError: something broke during the run (a server died, a disk is full). Exit code 1; 3 if the budget is spent, 130
after a signal.
Both have a message of one sentence: what happened, and what to do. Entry points print it without a traceback. Passwords
and keys in URLs are masked in every message.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

EXIT_RUN = 1
EXIT_USER = 2
EXIT_BUDGET = 3
EXIT_UNEXPECTED = 70  # an unexpected exception in a process that is restarted (EX_SOFTWARE of sysexits.h)
EXIT_INTERRUPTED = 130


MASK = "***"
_IN_URL = re.compile(
    r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]{0,30}://)"
    r"(?:[^\s/?#]*"  # name and password before the host, up to the last @
    r"|[^\s/?#@:]*:(?!\d+[/?#])[^\s@]*)@"  # a password with / ? or #, which should be %2F and so on
)
_IN_QUERY = re.compile(
    r"(?P<name>[?&;](?:[a-z0-9_.-]*[_.-])?(?:key|apikey|token|secret|password|passwd|pwd|sig|signature|credential)=)"
    r"[^\s&#'\"]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text with names, passwords and keys in its URLs masked."""
    if "://" not in text:
        return text
    return _IN_QUERY.sub(rf"\g<name>{MASK}", _IN_URL.sub(rf"\g<scheme>{MASK}@", text))


class UserError(ValueError):
    """The user can fix it; the masked message says how."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class RunError(RuntimeError):
    """A failure of the run; the masked message names rank, phase and peer, if any."""

    def __init__(self, message: str = "") -> None:
        super().__init__(masked(message))


class NoEngineLeft(RunError):
    """Every engine is dead, hung or not synced yet. The run can continue when an engine is back."""


class EvaluationFailed(RunError):
    """Most conversations of an evaluation failed; the message has the counts. The trainer's state is fine."""


class WeightsDiffer(RunError):
    """An engine does not serve the trainer's weights: training on its samples would be silently wrong."""


class DiskFull(RunError):
    """A write met a full disk or quota."""


class RunStops(RunError):
    """Nothing broke, but the run must stop; it saves a checkpoint first."""


class BudgetSpent(RunStops):
    """The budget for LLM APIs is spent."""


class SimulatorSick(RunStops):
    """Too many replies of a simulator are odd, so training on them would teach the wrong thing."""


class TooManyErrors(RunStops):
    """More futures of a step than the config allows ended with an unexpected exception: a bug."""


class GradientsNotFinite(RunStops):
    """Too many optimizer steps in a row were skipped: the policy does not learn any more."""


class WeightsNotFinite(RunError):
    """An update made weights NaN or infinite; they must not be used or saved."""


class Interrupted(RunStops):
    """A signal has ended the process."""


def exit_code(error: RunError) -> int:
    return EXIT_BUDGET if isinstance(error, BudgetSpent) else EXIT_RUN


def _one_line(error: Exception) -> str:
    """The message without line ends, which values or texts of libraries may contain."""
    return " ".join(filter(None, map(str.strip, str(error).splitlines())))


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point and leave the process with 0, 1 (RunError), 2 (UserError), 3 (BudgetSpent) or 130 (a signal).

    Any other exception is a bug and keeps its traceback, which is masked. A crash leaves no memory on disk, where keys
    would be: for this process and all that it starts.
    """
    no_core_dumps()
    sys.excepthook = _print_masked
    try:
        main()
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)  # the process that sent the signal prints the message
    except RunError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def run_rank(main: Callable[[], None]) -> NoReturn:
    """Run a trainer rank and end the process with the exit code of run_cli, after the exit handlers.

    The interpreter is not finalized. During finalization, CPython before 3.14 ends a daemon thread that returns from
    native code with pthread_exit. In pybind11 code (torch's stores and process groups) the thread then unwinds through
    a destructor that must not throw, and the process aborts: "terminate called without an active exception", with exit
    code 134 in place of the code that the launcher expects.
    """
    code = EXIT_RUN
    try:
        run_cli(main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_RUN
    except BaseException as error:  # noqa: BLE001 - printed as by the interpreter
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def no_core_dumps() -> None:
    """For this process and its future children: no core file, and no memory in what a system's handler of crashes gets,
    which does not heed the limit. The hard limit stays, so that a user can raise the soft one for a process again."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):  # a kernel without the file writes no core either
        Path("/proc/self/coredump_filter").write_text("0")


def _print_masked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
