"""How full this machine's memories are, as shares of 1."""

from __future__ import annotations

import psutil
import torch


def memory_shares() -> dict[str, float]:
    """system/host_memory_share, and system/gpu_memory_share of this process's device where there is one."""
    memory = psutil.virtual_memory()
    shares = {"system/host_memory_share": 1 - memory.available / memory.total}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        shares["system/gpu_memory_share"] = 1 - free / total
    return shares
