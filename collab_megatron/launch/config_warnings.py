"""Warnings at the start about settings that ruin a run without an error: user prompts without an end, full memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from collab_megatron.config import RLConfig, SupervisedConfig
from collab_megatron.config.roles import user_places
from collab_megatron.config.sections import SimulatorsSection
from collab_megatron.launch.node import Node
from collab_megatron.launch.plan import stages_of
from collab_megatron.model.memory import engine_runtime
from collab_megatron.model.spec import ModelSpec

logger = logging.getLogger(__name__)

NEAR = 0.9
"""Share of a memory from which an estimate is near the limit: the formula's error is about the rest."""


def warn_of_config(config: RLConfig, spec: ModelSpec, node: Node) -> None:
    """Log all warnings."""
    warn_of_prompts(config.simulators)
    warn_of_memory(config, spec, node)


def warn_of_prompts(simulators: SimulatorsSection) -> None:
    for sentence in prompt_warnings(simulators):
        logger.warning("%s", sentence)


def warn_of_memory(config: RLConfig | SupervisedConfig, spec: ModelSpec, node: Node) -> None:
    for sentence in memory_warnings(config, spec, node):
        logger.warning("%s", sentence)


def prompt_warnings(simulators: SimulatorsSection) -> Iterator[str]:
    """Simulated users that cannot end the chat, so that every future runs to its last turn."""
    for place, part in user_places(simulators.user).items():
        if part.prompt_file is None:
            continue
        if not re.search(r"\$(termination_signal\b|\{termination_signal\})", part.prompt_file.read_text("utf-8")):
            yield (
                f"{place}.prompt_file={part.prompt_file} does not contain $termination_signal: this user "
                "cannot end a conversation, and each runs to its last turn"
            )


def memory_warnings(config: RLConfig | SupervisedConfig, spec: ModelSpec, node: Node) -> Iterator[str]:
    """Estimates near or above the memory of a GPU or of the host."""
    device, ranks = node.device(config.parallel), config.parallel.world_size
    stages = stages_of(config, spec, device)
    top = max(stage.device for stage in stages)
    remedy = "lower train.micro_batch_tokens, set train.recompute, or raise parallel.tensor or parallel.pipeline"
    if device == "cuda" and node.gpu_bytes is not None:
        # an engine that has given its weights and KV cache back keeps the rest
        shares = isinstance(config, RLConfig) and config.engine.placement == "colocated"
        engine = engine_runtime(node.gpu_bytes) if shares else 0
        if top > NEAR * (node.gpu_bytes - engine):
            has = f"a GPU has {node.gpu_bytes / 2**30:.1f} GB"
            keeps = f", of which a colocated engine keeps about {engine / 2**30:.1f} GB" if engine else ""
            yield f"a trainer rank is estimated at {top / 2**30:.1f} GB and {has}{keeps}: {remedy}"
    each = ranks // len(stages)
    host = sum(each * (stage.host + (stage.device if device == "cpu" else 0)) for stage in stages)
    if node.host_bytes is not None and host > NEAR * node.host_bytes:
        yield (
            f"the trainer ranks are estimated at {host / 2**30:.1f} GB of host memory and the machine has "
            f"{node.host_bytes / 2**30:.1f} GB, which the engines need too: {remedy}"
        )
