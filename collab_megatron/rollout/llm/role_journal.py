"""A role's window onto the journal: what was answered before is not asked again, what is answered now is kept first."""

from __future__ import annotations

from collab_megatron.rollout.journal.replies import RecordedReply, reply_key
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm.litellm_api import ApiReply, Request


class Recorded:
    """Requests by what was asked: the role's model and not the deployment's, so that a replay may use another."""

    def __init__(self, journal: Journal, role: str, model: str) -> None:
        self._journal = journal
        self._role = role
        self._model = model

    def key(self, request: Request, sample_index: int) -> bytes:
        """A request's name in the journal."""
        parameters = {
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "n": request.n,
            "seed": request.seed,
            "json": request.json_reply,
            "schema": None if request.schema is None else dict(request.schema),
        }
        if request.extra:  # without any the key is that of older journals
            parameters["extra"] = dict(request.extra)
        return reply_key(self._model, request.messages, parameters, sample_index)

    @property
    def may_ask(self) -> bool:
        """Whether what the journal lacks, or has in a form that cannot be used, is asked for."""
        return self._journal.replay != "only"

    def look_up(self, key: bytes) -> tuple[ApiReply, float, int] | None:
        """What was answered, now free of charge; how long it took; the deployment. Raises ReplayMiss if nothing may be
        asked."""
        found = self._journal.reply(key, what=f"an answer of {self._role} ({self._model})")
        if found is None:
            return None
        reply = ApiReply(found.texts, found.prompt_tokens, found.completion_tokens, 0.0, found.model, found.fingerprint)
        return reply, found.latency_s, found.deployment

    def keep(self, key: bytes, reply: ApiReply, latency_s: float, deployment: int) -> None:
        """On disk before anyone uses it; texts that no caller may see (ApiReply.problem) are not in it."""
        row = RecordedReply(
            texts=reply.texts,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            cost_usd=reply.cost_usd,
            latency_s=latency_s,
            model=reply.model,
            fingerprint=reply.fingerprint,
            deployment=deployment,
        )
        self._journal.record_reply(key, self._role, row)
