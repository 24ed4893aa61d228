"""A role's window onto the journal: what was answered before is not asked again, what is answered now is kept first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collab_megatron.simulators.litellm_api import ApiReply, Request

if TYPE_CHECKING:
    from collab_megatron.journal.store import Journal


class Recorded:
    """Requests by what was asked: the role's model and not the deployment's, so that a replay may use another."""

    def __init__(self, journal: Journal, role: str, model: str) -> None:
        self._journal = journal
        self._role = role
        self._model = model

    def key(self, request: Request, sample_index: int) -> bytes:
        """A request's name in the journal."""
        from collab_megatron.journal.replies import reply_key

        parameters = {
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "n": request.n,
            "seed": request.seed,
            "json": request.json_reply,
            "schema": None if request.schema is None else dict(request.schema),
        }
        return reply_key(self._model, request.messages, parameters, sample_index)

    def look_up(self, key: bytes) -> tuple[ApiReply, float] | None:
        """What was answered, now free of charge, and how long it took. Raises ReplayMiss if nothing may be asked."""
        from collab_megatron.journal.store import ReplayMiss

        found = self._journal.reply(key)
        if found is not None:
            reply = ApiReply(
                found.texts, found.prompt_tokens, found.completion_tokens, 0.0, found.model, found.fingerprint
            )
            return reply, found.latency_s
        if self._journal.replay == "only":
            raise ReplayMiss(
                f"simulators.{self._role} ({self._model}): the journal lacks the answer to a request, and with "
                "journal.replay=only nothing is asked anew; use the config that wrote it, or journal.replay=auto"
            )
        return None

    def keep(self, key: bytes, reply: ApiReply, latency_s: float, deployment: int) -> None:
        """On disk before anyone uses it; texts that no caller may see (ApiReply.problem) are not in it."""
        from collab_megatron.journal.replies import RecordedReply

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
