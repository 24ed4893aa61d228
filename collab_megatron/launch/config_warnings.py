"""Warnings at the start about settings that ruin a run without an error: user prompts without an end, full memory, a
weight in the wrong unit, an extraction that is cut off, programs without isolation."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

from collab_megatron.config import EvaluateConfig, RLConfig, SupervisedConfig
from collab_megatron.config.roles import (
    EXTRACTING_METRICS,
    llms_of_evaluation,
    role_of_metric,
    role_place,
    shipped_judges,
    user_places,
)
from collab_megatron.config.sections import EvaluationSection, LLMSection, RewardSection, SimulatorsSection
from collab_megatron.launch.node import Node
from collab_megatron.launch.plan import stages_of
from collab_megatron.model.memory import engine_runtime
from collab_megatron.model.spec import ModelSpec

logger = logging.getLogger(__name__)

UNITS_IN_1000_TOKENS = {"kilotokens": 1.0, "tokens": 1000.0, "words": 750.0}
"""Of token_amount; an English token is about three quarters of a word."""
LEAST_LOSS = 0.005  # of reward by 1,000 tokens
SHORT_SHARE = 0.5  # of 1,000 tokens: a length that must not reach the clamp
NEAR = 0.9
"""Share of a memory from which an estimate is near the limit: the formula's error is about the rest."""


def warn_of_config(config: RLConfig, spec: ModelSpec, node: Node) -> None:
    """Log all warnings."""
    warn_of_players(config)
    warn_of_memory(config, spec, node)


def warn_of_prompts(simulators: SimulatorsSection, evaluation: EvaluationSection | None = None) -> None:
    further = {} if evaluation is None else llms_of_evaluation(evaluation)
    for sentence in prompt_warnings({**user_places(simulators.user), **further}):
        logger.warning("%s", sentence)


def warn_of_players(config: RLConfig | EvaluateConfig) -> None:
    """Of simulated users and metrics."""
    warn_of_prompts(config.simulators, config.evaluation)
    for sentence in metric_warnings(config.reward, config.simulators, reply_tokens=config.rollout.max_new_tokens):
        logger.warning("%s", sentence)


def warn_of_memory(config: RLConfig | SupervisedConfig, spec: ModelSpec, node: Node) -> None:
    for sentence in memory_warnings(config, spec, node):
        logger.warning("%s", sentence)


def prompt_warnings(users: Mapping[str, LLMSection]) -> Iterator[str]:
    """Simulated users that cannot end the chat, so that every future runs to its last turn. users: key in the config ->
    user."""
    for place, part in users.items():
        if part.prompt_file is None:
            continue
        if not re.search(r"\$(termination_signal\b|\{termination_signal\})", part.prompt_file.read_text("utf-8")):
            yield (
                f"{place}.prompt_file={part.prompt_file} does not contain $termination_signal: this user "
                "cannot end a conversation, and each runs to its last turn"
            )


def metric_warnings(reward: RewardSection, simulators: SimulatorsSection, *, reply_tokens: int) -> Iterator[str]:
    """Metrics whose setting is probably a mistake. `reply_tokens`: the longest policy turn."""
    yield from _length_warnings(reward)
    for name, llm in shipped_judges(reward, simulators).items():
        if name in EXTRACTING_METRICS and llm is not None and llm.max_tokens < reply_tokens:
            place = role_place(role_of_metric(name, reward, simulators))
            yield (
                f"{place}.max_tokens={llm.max_tokens} is below rollout.max_new_tokens={reply_tokens}: {place} copies "
                f"the final result for {name}, and a long one would be cut off and fail; raise it"
            )
    if "pass_rate" in reward.metric_weights and reward.settings.get("pass_rate", {}).get("sandbox") == "unsafe":
        yield (
            "reward.settings.pass_rate.sandbox=unsafe: programs that the policy writes run with your rights, and can "
            "read your files and use the network"
        )


def _length_warnings(reward: RewardSection) -> Iterator[str]:
    """A weight of token_amount that belongs to another unit."""
    weight = abs(reward.metric_weights.get("token_amount", 0.0))
    unit = reward.settings.get("token_amount", {}).get("unit", "kilotokens")
    loss = weight * UNITS_IN_1000_TOKENS.get(unit, 0)
    limit = reward.metric_clamps.get("token_amount", 1.0)
    about = f"reward.metric_weights.token_amount={reward.metric_weights.get('token_amount', 0.0):g} is per {unit}, so"
    choices = "reward.settings.token_amount.unit is one of tokens, kilotokens, words"
    if 0 < loss < LEAST_LOSS:
        yield (
            f"{about} 1,000 tokens change the reward by only {loss:.2g}: the verl recipe's -0.0001 counts words, and "
            f"the paper's lambda tokens; {choices}"
        )
    elif limit is not None and loss * SHORT_SHARE >= limit:
        yield (
            f"{about} a conversation of {1000 * limit / loss:.3g} tokens reaches the clamp, and longer ones are all "
            f"alike: lower the weight; {choices}"
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
