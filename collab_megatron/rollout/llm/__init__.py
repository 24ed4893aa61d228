"""The LLMs around the policy: the one room that talks to an LLM API (and the only one that imports litellm)."""

from collab_megatron.rollout.llm.accounting import GatewaySnapshot, RoleUsage
from collab_megatron.rollout.llm.failure import SimulatorError
from collab_megatron.rollout.llm.gateway import Gateway
from collab_megatron.rollout.llm.health import SimulatorHealth
from collab_megatron.rollout.llm.user import LLMUserSimulator, ends_chat, strip_signal, user_simulator

__all__ = [
    "Gateway",
    "GatewaySnapshot",
    "LLMUserSimulator",
    "RoleUsage",
    "SimulatorError",
    "SimulatorHealth",
    "ends_chat",
    "strip_signal",
    "user_simulator",
]
