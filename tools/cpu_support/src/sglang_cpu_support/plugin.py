"""SGLang's plugin entry point (group sglang.srt.plugins): called in each of its processes, before a model is built."""

from __future__ import annotations

import os


def register() -> None:
    """Faster attention and sampling, and a pause that sleeps, in a process with SGLANG_USE_CPU_ENGINE=1."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        from . import attention, pausing, sampling

        attention.install()
        pausing.install()
        sampling.install()
