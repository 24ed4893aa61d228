"""The LiteLLM client: one function that sends a request and returns texts, token counts and dollars.

Choices, with the CPU time of one call measured against a trivial local server:
- `litellm.acompletion`, not `Router.acompletion`, which adds about 0.6 ms to every call, and retries and cool-downs of
  its own (deployments.py has the reasons).
- `hosted_vllm/NAME` is the cheapest way to an OpenAI-compatible server: about 1.6 ms, compared with 2.2 ms for
  `openai/NAME`, which goes through the openai client. Both work.
- A model without a price in LiteLLM's table is registered once, so that LiteLLM does not search for it on every call.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.config.sections import DeploymentSection, LLMSection
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm.prices import Price, listed_price, load_litellm
from collab_megatron.text import whole_text
from collab_megatron.types import LLMReply, LLMRequest

logger = logging.getLogger(__name__)

NO_KEY = "no-key"  # servers without authentication still need a header
LEAST_LIMIT_CHARS = 16_384  # takes a policy's tokenizer about 20 ms
MOST_TOKENS = 2**31  # in one answer: a larger count is an error, and SQLite takes none above 2**63
MOST_CHARS_PER_TOKEN = 16  # more than in any real text


@dataclass(frozen=True)
class Endpoint:
    """One deployment of a model, ready to be called."""

    section: DeploymentSection
    key: str | None = field(repr=False)
    price: Price | None  # None: unknown
    takes_schema: bool  # the model takes a JSON Schema, and the role's config asks for one


@dataclass(frozen=True)
class ApiRequest:
    """One request to the API for a caller's LLMRequest, whichever deployment gets it."""

    asked: LLMRequest[Any]
    section: LLMSection
    n: int  # replies that are still missing
    seed: int
    temperature: float  # the section's, or higher after a malformed reply

    @property
    def messages(self) -> list[dict[str, str]]:
        return [message.as_dict() for message in self.asked.messages]

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON Schema to send, to a model that takes one."""
        return self.asked.schema if self.asked.json_reply and self.section.response_format == "json_schema" else None

    @property
    def longest_chars(self) -> int:
        """A longer reply is discarded unread."""
        return max(LEAST_LIMIT_CHARS, MOST_CHARS_PER_TOKEN * self.section.max_tokens)


MANY_CONNECTIONS = "20000"
UNAWAITED = r"coroutine '[\w.]*\.(async_completion|acompletion|async_\w+_handler)\w*' was never awaited"


class LiteLLMApi:
    """The `litellm` module, set up once: no network at import, no telemetry, no retries of its own."""

    def __init__(self) -> None:
        # max_concurrency bounds the calls. LiteLLM's own bound of 500 connections per host would make the rest wait
        # within their deadlines, like calls to a slow provider
        os.environ.setdefault("AIOHTTP_CONNECTOR_LIMIT", MANY_CONNECTIONS)
        os.environ.setdefault("AIOHTTP_CONNECTOR_LIMIT_PER_HOST", MANY_CONNECTIONS)
        litellm = load_litellm()
        litellm.telemetry = False
        litellm.drop_params = True  # providers without `seed` or `n` still get the rest of the request
        litellm.num_retries = 0
        self._litellm = litellm
        logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)  # role_client.py counts and reports failures
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, and some contain the key
        # a call that is cancelled while LiteLLM prepares it in a thread leaves a coroutine behind: noise in the report
        # of what ended the run
        warnings.filterwarnings("ignore", message=UNAWAITED, category=RuntimeWarning)

    def check_model(self, place: str, deployment: DeploymentSection, provider: str | None) -> None:
        """Raise UserError if LiteLLM knows the model's provider neither by name nor by address.

        `provider`: the one that `extra` names, if any.
        """
        try:
            self._litellm.get_llm_provider(deployment.model, custom_llm_provider=provider, api_base=deployment.api_base)
        except Exception:  # noqa: BLE001 - LiteLLM would raise the same at the first call
            raise UserError(
                f"{place}.model={deployment.model}: LiteLLM does not know its provider; write PROVIDER/MODEL, such as "
                "openai/gpt-4o-mini, or openai/NAME with api_base for a compatible server"
            ) from None

    def know_price(self, place: str, endpoint: Endpoint) -> None:
        """Warn once about an unknown price, and spare LiteLLM the search for a price that it does not have."""
        model = endpoint.section.model
        if endpoint.price is None:
            logger.warning(
                "%s: no price known for %s; its calls are counted as 0 dollars "
                "(set input_usd_per_mtoken and output_usd_per_mtoken to count them)",
                place,
                model,
            )
        if listed_price(model) is None:  # an entry of zeros must not hide a listed price from another role
            self._register(model)

    def _register(self, model: str) -> None:
        if model in self._litellm.model_cost:
            return
        entry = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0, "mode": "chat"}
        if "/" in model:
            entry["litellm_provider"] = model.split("/", 1)[0]
        self._litellm.register_model({model: entry})

    def takes_schema(self, deployment: DeploymentSection) -> bool:
        """Whether the model takes a JSON Schema. A server at an address of the user's own is expected to."""
        return deployment.api_base is not None or bool(self._litellm.supports_response_schema(deployment.model))

    def takes_n(self, section: LLMSection) -> bool:
        """Whether LiteLLM knows that the providers of all deployments take `n`, a number of answers to one request."""
        provider = section.extra.get("custom_llm_provider")
        return all(
            "n" in (self._litellm.get_supported_openai_params(model, custom_llm_provider=provider) or ())
            for model in (section.model, *(deployment.model for deployment in section.deployments))
        )

    async def chat(self, endpoint: Endpoint, request: ApiRequest, timeout_s: float) -> LLMReply:
        """One request without retries. The texts of the reply are valid UTF-8, whatever the API sent.

        Raises whatever the client raises, and ValueError for an answer whose parts have wrong types;
        failure.classify reads both.
        """
        section = request.section
        options: dict[str, Any] = {**section.extra, **({"n": request.n} if request.n > 1 else {})}
        if request.schema is not None and endpoint.takes_schema:
            wanted = {"name": "reply", "strict": True, "schema": dict(request.schema)}
            options["response_format"] = {"type": "json_schema", "json_schema": wanted}
        elif request.asked.json_reply and section.response_format != "text":
            options["response_format"] = {"type": "json_object"}
        response = await self._litellm.acompletion(
            model=endpoint.section.model,
            messages=request.messages,
            api_base=endpoint.section.api_base,
            api_key=endpoint.key if endpoint.key is not None else NO_KEY,
            temperature=request.temperature,
            max_tokens=section.max_tokens,
            seed=request.seed,
            timeout=timeout_s,
            max_retries=0,
            num_retries=0,
            **options,
        )
        usage = getattr(response, "usage", None)
        prompt_tokens = _token_count(usage, "prompt_tokens")
        completion_tokens = _token_count(usage, "completion_tokens")
        texts = tuple(_content(choice.message.content) for choice in response.choices)
        problem = ""
        if any(choice.message.role != "assistant" for choice in response.choices):
            problem = "wrong_role"
        elif any(len(text) > request.longest_chars for text in texts):
            problem = "too_long"
        return LLMReply(
            texts=() if problem else texts,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_usd=self._cost_usd(endpoint, response, prompt_tokens, completion_tokens),
            model=whole_text(str(response.model or "")),
            fingerprint=whole_text(str(getattr(response, "system_fingerprint", None) or "")),
            problem=problem,
        )

    @staticmethod
    def _cost_usd(endpoint: Endpoint, response: Any, prompt_tokens: int, completion_tokens: int) -> float:
        price = endpoint.price
        if price is None:
            return 0.0
        if price.source == "litellm":
            # LiteLLM's own figure knows about cached and tiered tokens, which a product of two numbers does not
            counted = getattr(response, "_hidden_params", {}).get("response_cost")
            if counted and math.isfinite(counted):
                return float(counted)
        return price.cost_usd(prompt_tokens, completion_tokens)

    async def close(self) -> None:
        """Close the HTTP connections that LiteLLM keeps."""
        await self._litellm.close_litellm_async_clients()


def _content(content: object) -> str:
    """The text of a choice; empty if the API sent none. Raises ValueError if it is not text."""
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of a choice is not text but {type(content).__name__}")
    return whole_text(content or "")


def _token_count(usage: object, name: str) -> int:
    """A token count of the answer's `usage`; 0 if it has none. Raises ValueError if it is not a count."""
    count = getattr(usage, name, 0) or 0
    if not isinstance(count, (int, float)) or not 0 <= count < MOST_TOKENS:
        raise ValueError(f"usage.{name} is not a number of tokens")
    return int(count)
