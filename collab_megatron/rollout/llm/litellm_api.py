"""LiteLLM behind one small function: messages in, texts and token counts out.

Choices, with the CPU time of one call measured against a trivial local server:
- `litellm.acompletion`, not the Router's: that one adds about 0.6 ms to every call, and it brings retry and cool-down
  layers of its own, while this project has exactly one (role.py). Where a role has several deployments, the Router
  chooses among them (deployments.py), which costs 0.05 ms.
- `hosted_vllm/NAME` is the cheapest way to an OpenAI-compatible server: about 1.6 ms, against 2.2 ms for `openai/NAME`,
  which goes through the openai client. Both work.
- A model that LiteLLM has no price for is registered once, so that the price search is not repeated on every call.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.rollout.llm.prices import Price, listed_price, load_litellm
from collab_megatron.text import whole_text

logger = logging.getLogger(__name__)

NO_KEY = "no-key"  # servers without authentication still want the header filled
LEAST_LIMIT_CHARS = 16_384  # what a policy's tokenizer takes some 20 ms for
MOST_TOKENS = 2**31  # of one answer: a larger count is no count, and SQLite has none beyond 2**63
CHARS_PER_TOKEN = 16  # more than any real text has: an answer above it is not what was asked for


@dataclass(frozen=True)
class Endpoint:
    """One way to a model."""

    model: str
    api_base: str | None
    key: str | None = field(repr=False)
    price: Price | None  # None: nobody knows it
    json_mode: bool
    json_schema: bool  # wanted, and the model can


@dataclass(frozen=True)
class Request:
    """What is asked, wherever it is sent."""

    messages: Sequence[Mapping[str, str]]
    temperature: float
    max_tokens: int
    n: int
    seed: int
    json_reply: bool
    schema: Mapping[str, Any] | None
    extra: Mapping[str, Any] = field(default_factory=dict)  # further arguments of litellm.acompletion

    @property
    def longest_chars(self) -> int:
        """A reply above this is thrown away unread."""
        return max(LEAST_LIMIT_CHARS, CHARS_PER_TOKEN * self.max_tokens)


@dataclass(frozen=True)
class ApiReply:
    """One answered request. One that cannot be used for what it is has a `problem` and no texts."""

    texts: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    model: str = ""
    fingerprint: str = ""
    problem: str = ""  # wrong_role | too_long


MANY_CONNECTIONS = "20000"
UNAWAITED = r"coroutine '[\w.]*\.(async_completion|acompletion|async_\w+_handler)\w*' was never awaited"


class LiteLLMApi:
    """The `litellm` module, set up once: no network at import, no telemetry, no callbacks, no retries of its own."""

    def __init__(self) -> None:
        # max_concurrency bounds the calls; LiteLLM's own bound of 500 connections a host would let the rest wait inside
        # their deadlines, like calls to a slow provider
        os.environ.setdefault("AIOHTTP_CONNECTOR_LIMIT", MANY_CONNECTIONS)
        os.environ.setdefault("AIOHTTP_CONNECTOR_LIMIT_PER_HOST", MANY_CONNECTIONS)
        litellm = load_litellm()
        litellm.telemetry = False
        litellm.drop_params = True  # providers without `seed` or `n` still serve the rest of the request
        litellm.num_retries = 0
        self._litellm = litellm
        self._clear_callbacks()
        for name in ("LiteLLM", "LiteLLM Router"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are counted and reported by role.py
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, and some carry the key
        # a call that is cancelled while LiteLLM prepares it in a thread leaves the coroutine that it prepared: noise in
        # the report of whatever ended the run
        warnings.filterwarnings("ignore", message=UNAWAITED, category=RuntimeWarning)

    def _clear_callbacks(self) -> None:
        """Each is paid for on every call of every role."""
        for callbacks in (
            self._litellm.callbacks,
            self._litellm.success_callback,
            self._litellm.failure_callback,
            self._litellm._async_success_callback,
            self._litellm._async_failure_callback,
        ):
            callbacks.clear()

    def check_model(self, where: str, model: str, api_base: str | None, provider: str | None) -> None:
        """Raise UserError for a name whose provider LiteLLM knows neither by name nor by address. provider: typed."""
        try:
            self._litellm.get_llm_provider(model, custom_llm_provider=provider, api_base=api_base)
        except Exception:  # noqa: BLE001 - whatever LiteLLM raises, it would refuse the first call with it too
            raise UserError(
                f"{where}.model={model}: LiteLLM knows no provider of it; write PROVIDER/MODEL, such as "
                "openai/gpt-4o-mini, or openai/NAME with api_base for a compatible server"
            ) from None

    def know_price(self, where: str, endpoint: Endpoint) -> None:
        """Where LiteLLM has no price, spare it the search on every call; where nobody has one, warn once."""
        if endpoint.price is None:
            logger.warning(
                "%s: no price known for %s; its calls are counted as 0 dollars "
                "(set input_usd_per_mtoken and output_usd_per_mtoken to count them)",
                where,
                endpoint.model,
            )
        if listed_price(endpoint.model) is None:  # an entry of zeros must not hide a listed price from another role
            self._register(endpoint.model)

    def _register(self, model: str) -> None:
        if model in self._litellm.model_cost:
            return
        entry = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0, "mode": "chat"}
        if "/" in model:
            entry["litellm_provider"] = model.split("/", 1)[0]
        self._litellm.register_model({model: entry})

    def can_schema(self, model: str, api_base: str | None) -> bool:
        """Whether the model takes a JSON schema. Of a server at an address of the user's own nobody knows better."""
        return api_base is not None or bool(self._litellm.supports_response_schema(model))

    def router(self, group: str, models: Sequence[str], cooldown_s: float) -> Any:
        """A Router that chooses and keeps the cool-downs it is told of. It is given no keys, since it sends nothing."""
        made = self._litellm.Router(
            model_list=[
                {"model_name": group, "litellm_params": {"model": model}, "model_info": {"id": str(index)}}
                for index, model in enumerate(models)
            ],
            num_retries=0,
            cooldown_time=cooldown_s,
            disable_cooldowns=True,  # of its own: it spares a dead server, and never hears of our time-outs
        )
        self._clear_callbacks()
        return made

    async def chat(self, endpoint: Endpoint, request: Request, timeout_s: float) -> ApiReply:
        """One request, no retry; the texts are valid UTF-8, whatever came. Raises whatever the client raises, and
        ValueError for an answer whose parts are not of their kind; failure.classify reads it."""
        options: dict[str, Any] = {**request.extra, **({"n": request.n} if request.n > 1 else {})}
        if request.json_reply and request.schema is not None and endpoint.json_schema:
            wanted = {"name": "reply", "strict": True, "schema": dict(request.schema)}
            options["response_format"] = {"type": "json_schema", "json_schema": wanted}
        elif request.json_reply and endpoint.json_mode:
            options["response_format"] = {"type": "json_object"}
        response = await self._litellm.acompletion(
            model=endpoint.model,
            messages=[dict(message) for message in request.messages],
            api_base=endpoint.api_base,
            api_key=endpoint.key if endpoint.key is not None else NO_KEY,
            temperature=request.temperature,
            max_tokens=request.max_tokens,
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
        return ApiReply(
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
    """A choice's text, where the API gave none an empty one. Raises ValueError for what is no text."""
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of a choice is no text but {type(content).__name__}")
    return whole_text(content or "")


def _token_count(usage: object, name: str) -> int:
    """A count of the answer's `usage`, 0 where it has none. Raises ValueError for what counts no tokens."""
    count = getattr(usage, name, 0) or 0
    if not isinstance(count, (int, float)) or not 0 <= count < MOST_TOKENS:
        raise ValueError(f"usage.{name} is no number of tokens")
    return int(count)
