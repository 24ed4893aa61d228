"""One set-up of logging for every process of a run: lines that name who wrote them, third parties quiet.

    set_up_logging("trainer-0")

Lines go to stderr: the terminal for the launcher and the trainer's rank 0, the log file that the launcher opened for
everybody else (launch/supervisor.py). What a command is asked for (a plan, figures) is printed, not logged.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from collab_megatron.errors import masked

PACKAGE = "collab_megatron"

# httpx and its like log whole URLs, and some carry a key; the others report what this project counts and reports itself
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
    """Ours, so that a second set-up finds it."""


def set_up_logging(who: str, stream: TextIO | None = None) -> None:
    """Lines of `who` (`launcher`, `trainer-3`, `driver-0`) from INFO on go to `stream` (None: stderr); of other
    packages warnings only, of the talkative ones errors. Again in the same process: the newest call holds.

    Before the imports of megatron, transformers and litellm, which set levels of their own.
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
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at its import, over the level set above


class _Formatter(logging.Formatter):
    """`12:03:44 trainer-0 trainer.actor.backend: ...`, with the level where it is more than news."""

    def __init__(self, who: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))  # with the traceback, where it has one

    def formatMessage(self, record: logging.LogRecord) -> str:
        where = record.name.removeprefix(f"{PACKAGE}.")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, self.datefmt)} {self._who} {where}: {level}{record.message}"
