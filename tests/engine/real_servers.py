"""Real SGLang servers, forked from a process that has imported SGLang: ready in seconds, the same code from there on.

The end-to-end tests have servers that the launcher starts, with all their imports.
"""

from __future__ import annotations

from pathlib import Path

import torch

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import engine_command
from collab_megatron.launch.supervisor import Supervisor
from tests.forks import ForkingSupervisor, ForkServer

# what SGLang, OpenMP and malloc read at their start; torch.compile takes seconds for functions of a few elements
_COMMAND = engine_command(EngineSection(), model_path="none", dtype="float32", device="cpu", port=1, seed=0)
SGLANG = ForkServer(["tests.engine.preload"], {**_COMMAND.env, "TORCH_COMPILE_DISABLE": "1"})


def server_supervisor(logs: Path) -> Supervisor:
    """Starts servers and ends them; forks them where torch has no CUDA."""
    return ForkingSupervisor(SGLANG, logs) if torch.version.cuda is None else Supervisor(logs)


def end_at_once(supervisor: Supervisor) -> None:
    """Kill the server: a graceful end takes six seconds and saves nothing."""
    supervisor.note_shared_memory()  # while they have it mapped
    for child in supervisor._children:
        supervisor.kill(child)
    supervisor.__exit__(None, None, None)
