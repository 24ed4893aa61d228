"""Counters of what a pool's servers did, and their growth over one step for the dashboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from collab_megatron.figures import Figure, Figures
from collab_megatron.types import Generation


@dataclass
class PoolUsage:
    """Counters over all servers since the pool was made. Only answered requests count."""

    requests: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0  # counted for each of a request's n continuations
    cached_tokens: int = 0  # prompt tokens served from a prefix cache
    retried: int = 0  # repetitions of requests
    generated_by: Mapping[str, int] = field(default_factory=dict)  # URL -> generated tokens

    def count(self, url: str, prompt_tokens: int, generations: Sequence[Generation]) -> None:
        """Count one answer of the server at `url` to a prompt of `prompt_tokens`."""
        generated = sum(len(g.token_ids_T) for g in generations)
        self.requests += 1
        self.prompt_tokens += prompt_tokens * len(generations)
        self.generated_tokens += generated
        self.cached_tokens += sum(g.cached_tokens for g in generations)
        self.generated_by = {**self.generated_by, url: self.generated_by.get(url, 0) + generated}

    def copy(self) -> PoolUsage:
        return PoolUsage(**{f.name: getattr(self, f.name) for f in fields(self)})

    def since(self, before: PoolUsage) -> PoolUsage:
        """The counters' growth."""
        return PoolUsage(
            requests=self.requests - before.requests,
            generated_tokens=self.generated_tokens - before.generated_tokens,
            prompt_tokens=self.prompt_tokens - before.prompt_tokens,
            cached_tokens=self.cached_tokens - before.cached_tokens,
            retried=self.retried - before.retried,
            generated_by={url: now - before.generated_by.get(url, 0) for url, now in self.generated_by.items()},
        )

    def figures(self, *, live: Sequence[str], lost: int, seconds: float) -> Figures:
        """Dashboard figures of usage that took `seconds`; `live`: the URLs that are live after it.

        engine/share_min and _max: the tokens of the least and the most used live server, as a share of all.
        """
        shares = [self.generated_by.get(url, 0) / max(self.generated_tokens, 1) for url in live]
        return {
            "rollout/generated_tokens": Figure.of("sum", [self.generated_tokens]),
            "rollout/tokens_per_s": Figure.of("sum", [self.generated_tokens / seconds]),
            "rollout/cached_share": Figure.ratio(self.cached_tokens, max(self.prompt_tokens, 1)),
            "engine/live": Figure.of("max", [len(live)]),
            "engine/lost": Figure.of("max", [lost]),
            "engine/retried": Figure.of("sum", [self.retried]),
            "engine/share_min": Figure.of("min", [min(shares, default=0.0)]),
            "engine/share_max": Figure.of("max", [max(shares, default=0.0)]),
        }
