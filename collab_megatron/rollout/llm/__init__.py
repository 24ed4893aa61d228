"""Clients of LLM APIs for simulated users, judges and assistants. Only this room imports litellm."""

from collab_megatron.rollout.llm.accounting import GatewaySnapshot, RoleUsage
from collab_megatron.rollout.llm.failure import SimulatorError
from collab_megatron.rollout.llm.gateway import Gateway
from collab_megatron.rollout.llm.health import SimulatorHealth
from collab_megatron.rollout.llm.user import LLMUserSimulator, ends_chat, evaluation_users, user_simulator

__all__ = [
    "Gateway",
    "GatewaySnapshot",
    "LLMUserSimulator",
    "RoleUsage",
    "SimulatorError",
    "SimulatorHealth",
    "ends_chat",
    "evaluation_users",
    "user_simulator",
]
