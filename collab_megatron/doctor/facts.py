"""Versions of packages and programs on this machine; tools/gpu_check.py and the doctor report them."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Mapping

PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "numpy", "megatron-core", "transformer-engine"),
    *("transformer-engine-cu13", "transformer-engine-torch", "flash-attn", "apex", "sglang", "sglang-kernel"),
    *("torch-memory-saver", "flashinfer-python", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"),
    *("litellm", "openai", "pydantic"),
)
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "nvidia-smi": ("--query-gpu=name,driver_version,memory.total,memory.used,clocks.max.sm", "--format=csv,noheader"),
    "nvcc": ("--version",),
}
PROGRAM_S = 30.0


def packages() -> dict[str, str]:
    """Installed versions; packages that are not there are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def said_by(program: str, arguments: tuple[str, ...]) -> str:
    """The output of a program, or why there is none."""
    if shutil.which(program) is None:
        return "not installed"
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return (done.stdout or done.stderr).strip()
