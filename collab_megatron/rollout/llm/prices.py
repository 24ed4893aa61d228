"""Prices of models: those in the config, otherwise those in LiteLLM's table. No network.

LiteLLM counts an unknown model as 0 dollars, and a cap in dollars would then never take effect. So an unknown price
stays unknown here (None), a cap refuses it (`require_prices`), and a zero counts only if it is in the config: LiteLLM's
table has zeros for models on servers of the user's own, whose price only the user knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from collab_megatron.config.sections import BudgetSection, DeploymentSection
from collab_megatron.errors import UserError

ASK_A_SERVER = ("ollama", "ollama_chat", "huggingface", "lemonade")
"""Providers whose prices LiteLLM asks for over the network: set them in the config."""


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input_usd_per_mtoken: float
    output_usd_per_mtoken: float
    source: Literal["config", "litellm"]  # config: at least one of the two

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars of one request, with cached and tiered tokens at the full price."""
        return (prompt_tokens * self.input_usd_per_mtoken + completion_tokens * self.output_usd_per_mtoken) / 1e6


def price(section: DeploymentSection) -> Price | None:
    """The price of this deployment (of a role's section, its first); None if it is unknown.

    If the config has only one of the two prices, the table adds the other. Unless it has both, the first call of a
    process takes seconds, for LiteLLM's import.
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
    """The price in the table of the installed LiteLLM."""
    if model.split("/", 1)[0] in ASK_A_SERVER:
        return None
    try:
        info = load_litellm().get_model_info(model)
    except Exception:  # noqa: BLE001 - LiteLLM raises a bare Exception for an unknown model
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
                f"budget.{caps[0]} cannot count what {place} costs: the price of {section.model} is unknown; "
                f"set {place}.input_usd_per_mtoken and output_usd_per_mtoken (0 for a server that is free)"
            )


def load_litellm() -> Any:
    """The module, with the price table of its package instead of the one online."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm  # here, because it takes seconds and only LLM roles need it

    litellm.suppress_debug_info = True  # else it prints a list of providers for every unknown model
    return litellm
