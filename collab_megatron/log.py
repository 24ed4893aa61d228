"""Logging of every process of a run: lines name the process, and other packages are quiet.

    set_up_logging("trainer-0")

Lines go to stderr: the terminal for the launcher and trainer rank 0, a log file for all other processes
(launch/supervisor.py). The output of a command (a plan, figures) is printed, not logged.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from collab_megatron.errors import masked

PACKAGE = "collab_megatron"

# httpx and similar packages log whole URLs, which may contain a key; this project reports the others' events itself
QUIET = {
    "LiteLLM": logging.CRITICAL,
    "LiteLLM Proxy": logging.CRITICAL,
    "LiteLLM Router": logging.CRITICAL,
    "aiohttp": logging.ERROR,
    "asyncio": logging.ERROR,
    "filelock": logging.ERROR,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
    "huggingface_hub": logging.ERROR,
    "megatron": logging.ERROR,
    "openai": logging.WARNING,
    "torch": logging.ERROR,
    "transformers": logging.ERROR,
    "urllib3": logging.ERROR,
}


class _Handler(logging.StreamHandler[TextIO]):
    """Own class, so that a second set-up replaces it."""


def set_up_logging(who: str, stream: TextIO | None = None) -> None:
    """Log this project's lines from INFO on to `stream` (None: stderr), in the name of `who` (`launcher`, `trainer-3`,
    `driver-0`). Other packages log warnings only, the packages in QUIET less. A second call replaces the first.

    Call it before the imports of megatron, transformers and litellm, which set their own levels.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setFormatter(_Formatter(who))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at the import of transformers, over the level above


def log_of_server(on_malformed: Callable[[], None] = lambda: None) -> logging.Logger:
    """For an aiohttp server: its log of exceptions without those of malformed requests, for each of which it calls
    `on_malformed`, and of clients that hang up. Strangers could fill the disk with their tracebacks."""

    def is_bug(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        malformed = type(error).__module__ == "aiohttp.http_exceptions"  # by name: few processes import aiohttp
        if malformed:
            on_malformed()
        return not malformed and not isinstance(error, ConnectionResetError)

    log = logging.Logger("aiohttp.server", logging.ERROR)
    log.parent = logging.getLogger()
    log.addFilter(is_bug)
    return log


class _Formatter(logging.Formatter):
    """`12:03:44 trainer-0 trainer.actor.backend: ...`, with the level if it is above INFO."""

    def __init__(self, who: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))  # includes a traceback

    def formatMessage(self, record: logging.LogRecord) -> str:
        where = record.name.removeprefix(f"{PACKAGE}.")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, self.datefmt)} {self._who} {where}: {level}{record.message}"
