"""Environment of trainer ranks on GPUs: what NCCL and the driver read when a process first uses them."""

from __future__ import annotations

import os

from collab_megatron.config import RLConfig, SFTConfig
from collab_megatron.engine.server_args import nccl_settings
from collab_megatron.launch.node import device_of

ONE_QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS"


def trainer_env(config: RLConfig | SFTConfig) -> dict[str, str]:
    """Variables of every rank; nothing on CPU. What the user has set stays."""
    if device_of(config.parallel) == "cpu":
        return {}
    env = {}
    if config.parallel.tensor > 1 or config.parallel.context > 1:
        # Megatron starts a collective just before the kernel that it shall overlap with, and relies on one queue for
        # that order (megatron-core 0.16.1, core/tensor_parallel/layers.py). Servers have 8: SGLang sets that itself
        env[ONE_QUEUE] = os.environ.get(ONE_QUEUE, "1")
    if isinstance(config, RLConfig) and config.sync.transport_for(config.engine.placement) == "broadcast":
        env |= nccl_settings(config.engine.extra_args, os.environ)
    return env
