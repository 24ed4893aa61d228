"""What the LLM roles did so far: counters, snapshots, and the difference of two snapshots for one step's dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

API_USAGE_FILE = "api_usage.json"
"""Where a process leaves its final counters, for the totals of a run."""


@dataclass
class RoleUsage:
    """One role's counters since the gateway was made."""

    calls: int = 0  # complete() calls begun
    attempts: int = 0  # requests sent, retries included
    retries: int = 0  # attempts after the first of a call
    malformed: int = 0  # answers that came but could not be used
    failures: int = 0  # calls that ended in SimulatorError
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    wait_s: float = 0.0  # seconds in requests and back-off, summed over calls
    queue_s: float = 0.0  # seconds waiting for a free slot, summed over calls
    in_flight: int = 0  # requests at this moment: a gauge, not a counter

    def copy(self) -> RoleUsage:
        return RoleUsage(**{f.name: getattr(self, f.name) for f in fields(self)})

    def since(self, before: RoleUsage) -> RoleUsage:
        """The counters' growth since `before`; the gauge stays as it is."""
        grown = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        return RoleUsage(**{**grown, "in_flight": self.in_flight})


@dataclass(frozen=True)
class GatewaySnapshot:
    """All roles at one moment; subtract an earlier one to get a step's share."""

    roles: Mapping[str, RoleUsage] = field(default_factory=dict)

    def __sub__(self, before: GatewaySnapshot) -> GatewaySnapshot:
        zero = RoleUsage()
        return GatewaySnapshot({name: usage.since(before.roles.get(name, zero)) for name, usage in self.roles.items()})

    @property
    def calls(self) -> int:
        return sum(usage.calls for usage in self.roles.values())

    @property
    def failures(self) -> int:
        return sum(usage.failures for usage in self.roles.values())

    @property
    def cost_usd(self) -> float:
        return sum(usage.cost_usd for usage in self.roles.values())

    def metrics(self, prefix: str = "simulator") -> dict[str, float]:
        """Dashboard names to numbers: `simulator/user/calls`, ..., and `simulator/cost_usd` over all roles."""
        named = {
            f"{prefix}/{role}/{f.name}": float(getattr(usage, f.name))
            for role, usage in self.roles.items()
            for f in fields(usage)
        }
        named[f"{prefix}/cost_usd"] = self.cost_usd
        return named
