"""Memory of GPUs that trainer and engines share: engine.mem_fraction, where the config leaves it open.

Without it SGLang takes what is free at its start, nearly all: the trainer would find nothing. The engines start first,
because SGLang divides what it finds free; the trainer ranks wait for them before they use their GPU.
"""

from __future__ import annotations

import math

from collab_megatron.config import RLConfig
from collab_megatron.errors import UserError
from collab_megatron.launch.machine_checks import check_gpus
from collab_megatron.launch.node import Node
from collab_megatron.launch.plan import stages_of
from collab_megatron.model.memory import colocated_share, engine_memory
from collab_megatron.model.spec import ModelSpec

DIGITS = 3  # of the share; rounded down
REMEDY = (
    "set optimizer.cpu_offload, raise parallel.tensor, parallel.pipeline or engine.tensor, or set "
    "engine.placement=disaggregated"
)


def with_share(config: RLConfig, spec: ModelSpec, node: Node) -> RLConfig:
    """The config with engine.mem_fraction set where colocated engines are started on GPUs; else unchanged.

    Raises UserError where there are too few GPUs, or the memory of one is not known or does not hold both.
    """
    engine, device = config.engine, node.device(config.parallel)
    if device != "cuda" or engine.placement != "colocated" or engine.urls or engine.mem_fraction is not None:
        return config
    check_gpus(config.parallel, config.parallel.world_size, node)
    if node.gpu_bytes is None:
        raise UserError(
            "engine.placement=colocated divides the memory of a GPU, which nvidia-smi does not report here: set "
            "engine.mem_fraction to the share for the engine's weights and KV cache, such as 0.4"
        )
    stages = stages_of(config, spec, device)
    bucket_bytes = int(config.sync.bucket_mb_on(device) * 2**20)
    share = colocated_share(stages, gpu_bytes=node.gpu_bytes, bucket_bytes=bucket_bytes)
    memory = engine_memory(spec, dtype=config.model.dtype, engine=engine)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    least = memory.weights + (memory.kv_cache or longest * memory.kv_per_token)
    if share * node.gpu_bytes < least:
        kept = max(stage.resident for stage in stages)
        raise UserError(
            f"engine.placement=colocated: next to {kept / 2**30:.1f} GB that a trainer rank keeps and the working "
            f"memory of both, a GPU of {node.gpu_bytes / 2**30:.1f} GB has no {least / 2**30:.1f} GB for an engine "
            f"rank's weights and KV cache: {REMEDY}"
        )
    scale = 10**DIGITS
    section = engine.model_copy(update={"mem_fraction": math.floor(share * scale) / scale})
    return config.model_copy(update={"engine": section})
