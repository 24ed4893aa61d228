"""Check that trainer and engines have the same torch and NCCL, where they share GPU memory or a communicator.

Two versions of NCCL cannot form a communicator, and CUDA IPC handles come from one torch to another as pickles: with
two environments a run would hang or end at its first weight sync, after everything has been loaded. Both interpreters
are asked at the same time; each imports torch, which the launcher does not.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from collab_megatron.config.sections import EngineSection, SyncSection
from collab_megatron.engine.server_args import PYTHON_PLACES
from collab_megatron.errors import UserError
from collab_megatron.launch.interpreter import ask_interpreter

logger = logging.getLogger(__name__)

VERSIONS_TIMEOUT_S = 120.0  # the import of torch takes some 3 s, from a cold network file system a minute
# the wheels of torch for CUDA bring their own NCCL; a build without CUDA has none
QUESTION = """
import json, torch
cuda = torch.version.cuda
nccl = torch.cuda.nccl.version() if cuda else ()
print(json.dumps([torch.__version__.partition("+")[0], cuda, ".".join(map(str, nccl))]))
"""


@dataclass(frozen=True)
class Versions:
    """What an interpreter has. Example: Versions("2.14.1", "13.0", "2.30.7")"""

    torch: str
    cuda: str | None
    nccl: str

    def __str__(self) -> str:
        return f"torch {self.torch} for " + (f"CUDA {self.cuda}, NCCL {self.nccl}" if self.cuda else "CPU only")


def check_versions(engine: EngineSection, sync: SyncSection, device: str) -> None:
    """Raise UserError if engines in an environment of their own cannot get weights from this one's GPUs."""
    transport = sync.transport_for(engine.placement)
    if engine.python is None or engine.urls or device != "cuda" or transport == "disk":
        return
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(ask, (sys.executable, engine.python), (False, True))
    if ours is None or theirs is None:
        logger.warning(
            "torch and NCCL of engine.python were not checked: its import took over %g s", VERSIONS_TIMEOUT_S
        )
        return
    if ours != theirs:
        raise UserError(
            f"engine.python={engine.python} has {theirs}, the trainer's {sys.executable} has {ours}: "
            f"sync.transport={transport} needs the same on both sides. Leave engine.python out and install both "
            "with make install-gpu (docs/install.md), or set sync.transport=disk"
        )


def ask(python: str, elsewhere: bool) -> Versions | None:
    """What `python` has; None if it does not answer in time. elsewhere: it has an environment of its own."""
    env = {key: value for key, value in os.environ.items() if not (elsewhere and key in PYTHON_PLACES)}
    answer = ask_interpreter(python, QUESTION, env=env, timeout_s=VERSIONS_TIMEOUT_S)
    if answer is None:
        return None
    lines = answer.output.strip().splitlines()
    if answer.code or not lines:
        raise UserError(f"torch cannot be imported by {python} ({answer.reason}): install it there (docs/install.md)")
    return Versions(*json.loads(lines[-1]))
