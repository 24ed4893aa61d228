"""What an SGLang server imports, once for all servers that are forked from the process that imports this.

SGLang spawns its scheduler and detokenizer, which would import everything again: here they are forked as well
(tests/forks.py).
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import setproctitle
import sglang.launch_server
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.registry  # noqa: F401

setproctitle.getproctitle()  # finds the place of a process's title now: later the environment lies elsewhere


def _stay_with_fork(*_: Any, **__: Any) -> None:
    """In the place of set_start_method("spawn", force=True)."""


multiprocessing.set_start_method("fork", force=True)
multiprocessing.set_start_method = _stay_with_fork
