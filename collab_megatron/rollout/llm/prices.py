"""What a token of a model costs: the price that the config types, else the one of LiteLLM's table. No network.

LiteLLM counts a model that it does not know as 0 dollars, and a cap in dollars would then never act. So unknown stays
unknown here (None), a cap refuses it (`require_prices`), and a zero counts only where the config types it: LiteLLM's
table has zeros for models that run on servers of the user's own, whose price only the user knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from collab_megatron.config.sections import BudgetSection, DeploymentSection
from collab_megatron.errors import UserError

ASK_A_SERVER = ("ollama", "ollama_chat", "huggingface", "lemonade")
"""Providers about whose models LiteLLM asks over the network: their prices must be typed."""


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input_usd_per_mtoken: float
    output_usd_per_mtoken: float
    source: Literal["config", "litellm"]  # config: at least one of the two was typed

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars of one request, cached and tiered tokens at the full price."""
        return (prompt_tokens * self.input_usd_per_mtoken + completion_tokens * self.output_usd_per_mtoken) / 1e6


def price(section: DeploymentSection) -> Price | None:
    """The price of the deployment that stands in `section` (not of its `deployments`); None where nobody knows it.

    One typed half is completed from the table. Takes seconds once in a process, for LiteLLM's import, unless both
    halves are typed.
    """
    into, out = section.input_usd_per_mtoken, section.output_usd_per_mtoken
    if into is not None and out is not None:
        return Price(into, out, "config")
    listed = listed_price(section.model)
    if into is None and out is None:
        return listed
    if listed is None:
        return None
    return Price(
        listed.input_usd_per_mtoken if into is None else into,
        listed.output_usd_per_mtoken if out is None else out,
        "config",
    )


def listed_price(model: str) -> Price | None:
    """The price in LiteLLM's table, which comes with its package."""
    if model.split("/", 1)[0] in ASK_A_SERVER:
        return None
    try:
        info = load_litellm().get_model_info(model)
    except Exception:  # noqa: BLE001 - LiteLLM raises a bare Exception for "not mapped"
        return None
    into, out = info.get("input_cost_per_token"), info.get("output_cost_per_token")
    if not into or not out:  # missing or 0
        return None
    return Price(float(into) * 1e6, float(out) * 1e6, "litellm")


def require_prices(deployments: Iterable[tuple[str, DeploymentSection]], budget: BudgetSection) -> None:
    """Raises UserError naming a deployment without a price if the budget has a cap in dollars.

    `deployments`: all of them, each with its place in the config.
    """
    caps = [name for name in ("soft_usd", "hard_usd") if getattr(budget, name) is not None]
    if not caps:
        return
    for place, section in deployments:
        if price(section) is None:
            raise UserError(
                f"budget.{caps[0]} cannot count what {place} costs: no price is known for {section.model}; "
                f"set {place}.input_usd_per_mtoken and output_usd_per_mtoken (0 for a server that is free)"
            )


def load_litellm() -> Any:
    """The module. Its price table is the one that it was installed with, not the one on the net."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm  # here because it takes seconds and only simulators need it

    litellm.suppress_debug_info = True  # it prints a list of providers for every model that it does not know
    return litellm
