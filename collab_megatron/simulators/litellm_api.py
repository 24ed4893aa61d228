"""LiteLLM behind one small function: messages in, texts and token counts out.

Choices, with the CPU time of one call measured against a trivial local server:
- `litellm.acompletion`, not the Router: a role has one deployment, the Router adds about 2 ms to every call, and it
  brings retry and cool-down layers of its own, while this project has exactly one (role.py).
- `hosted_vllm/NAME` is the cheapest way to an OpenAI-compatible server: about 2.2 ms, against 3.6 ms for `openai/NAME`,
  which goes through the openai client. Both work.
- A model that LiteLLM has no price for is registered once, so that the price search is not repeated on every call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collab_megatron.config.sections import LLMSection

logger = logging.getLogger(__name__)

NO_KEY = "no-key"  # servers without authentication still want the header filled


@dataclass(frozen=True)
class ApiReply:
    """One successful request."""

    texts: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float


class LiteLLMApi:
    """The `litellm` module, set up once: no network at import, no telemetry, no callbacks, no retries of its own."""

    def __init__(self) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # before the import, which would fetch prices from the net
        import litellm  # here because it takes seconds and only simulators need it

        litellm.telemetry = False
        litellm.suppress_debug_info = True
        litellm.drop_params = True  # providers without `seed` or `n` still serve the rest of the request
        litellm.num_retries = 0
        for callbacks in (
            litellm.callbacks,
            litellm.success_callback,
            litellm.failure_callback,
            litellm._async_success_callback,
            litellm._async_failure_callback,
        ):
            callbacks.clear()
        logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)  # failures are counted and reported by role.py
        self._litellm = litellm

    def know_price(self, role: str, section: LLMSection) -> None:
        """Make sure that the model has a price; where nobody knows one, count 0 dollars and say so once."""
        if section.input_usd_per_mtoken is not None or section.output_usd_per_mtoken is not None:
            self._register(section.model)
            return
        try:
            self._litellm.get_model_info(section.model)
        except Exception:  # noqa: BLE001 - LiteLLM raises a bare Exception for "not mapped"
            logger.warning(
                "simulators.%s: no price known for %s; its calls are counted as 0 dollars "
                "(set input_usd_per_mtoken and output_usd_per_mtoken to count them)",
                role,
                section.model,
            )
            self._register(section.model)

    def _register(self, model: str) -> None:
        if model in self._litellm.model_cost:
            return
        entry = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0, "mode": "chat"}
        if "/" in model:
            entry["litellm_provider"] = model.split("/", 1)[0]
        self._litellm.register_model({model: entry})

    async def chat(
        self,
        section: LLMSection,
        key: str | None,
        messages: Sequence[Mapping[str, str]],
        *,
        n: int,
        seed: int,
        json_reply: bool,
        timeout_s: float,
    ) -> ApiReply:
        """One request, no retry. Raises whatever the client raises; failure.classify reads it."""
        request: dict[str, Any] = {"n": n} if n > 1 else {}
        if json_reply and section.json_mode:
            request["response_format"] = {"type": "json_object"}
        response = await self._litellm.acompletion(
            model=section.model,
            messages=[dict(message) for message in messages],
            api_base=section.api_base,
            api_key=key if section.api_key_env is not None else NO_KEY,
            temperature=section.temperature,
            max_tokens=section.max_tokens,
            seed=seed,
            timeout=timeout_s,
            max_retries=0,
            num_retries=0,
            **request,
        )
        usage = getattr(response, "usage", None)
        prompt_tokens = int(getattr(usage, "prompt_tokens", 0) or 0)
        completion_tokens = int(getattr(usage, "completion_tokens", 0) or 0)
        return ApiReply(
            texts=tuple(choice.message.content or "" for choice in response.choices),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_usd=self._cost_usd(section, response, prompt_tokens, completion_tokens),
        )

    @staticmethod
    def _cost_usd(section: LLMSection, response: Any, prompt_tokens: int, completion_tokens: int) -> float:
        into, out = section.input_usd_per_mtoken, section.output_usd_per_mtoken
        if into is not None or out is not None:
            return (prompt_tokens * (into or 0.0) + completion_tokens * (out or 0.0)) / 1e6
        # LiteLLM's own figure knows about cached and tiered tokens, which a product of two numbers does not.
        return float(getattr(response, "_hidden_params", {}).get("response_cost") or 0.0)

    async def close(self) -> None:
        """Close the HTTP connections that LiteLLM keeps."""
        await self._litellm.close_litellm_async_clients()
