"""Small stand-ins for the players of a conversation; the real ones are met in tests/end_to_end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from collab_megatron.data.thought_tags import split_thoughts
from collab_megatron.errors import RunError
from collab_megatron.rollout.busy import BusyClock
from collab_megatron.rollout.future import Limits, Players
from collab_megatron.types import Generation, Message, PolicyTurn, ScoredConversation, Task

END = 9

TASK = Task(
    task_id="t1",
    prompt=(Message("user", "book a table"),),
    single_turn_prompt="book a table at noon",
    ground_truth="BOOK noon",
    metadata={"ambiguous": True},
)
LIMITS = Limits(max_user_turns=2, max_assistant_turns=3, max_new_tokens=4, max_context_tokens=100, temperature=1.0)


class LetterChat:
    """Every character is a token; END closes a reply; what stands in brackets is thought."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return [ord(c) for message in messages for c in message.content]

    def grow(self, context_ids: Sequence[int], messages: Sequence[Message], user_text: str) -> list[int]:
        return [*context_ids, *([] if self.ended(context_ids) else [END]), *(ord(c) for c in user_text)]

    def policy_turn(
        self, context_ids: Sequence[int], generation: Generation, *, begin_s: float = 0.0, end_s: float = 0.0
    ) -> PolicyTurn:
        ids = generation.token_ids_T
        sampled = "".join(chr(i) for i in ids if i != END)
        split = split_thoughts(sampled, ("(", ")"))
        cut = not (split.closed and self.ended(ids))
        return PolicyTurn(split.thought, split.reply, sampled, cut, generation, begin_s, end_s)

    def ended(self, token_ids: Sequence[int]) -> bool:
        return bool(token_ids) and token_ids[-1] == END


def generation(text: str, *, ended: bool = True, version: int = 0) -> Generation:
    ids = (*(ord(c) for c in text), *((END,) if ended else ()))
    return Generation(ids, (-0.5,) * len(ids), (version,) * len(ids), "stop" if ended else "length")


def policy_turn(text: str, *, ended: bool = True, version: int = 0) -> PolicyTurn:
    return LetterChat().policy_turn((), generation(text, ended=ended, version=version))


@dataclass
class ScriptedEngine:
    """Answers with the next of `texts`, over and over; remembers the contexts it was given."""

    texts: Sequence[str]
    contexts: list[list[int]] = field(default_factory=list)
    fail_after: int | None = None
    failure: RunError = field(default_factory=lambda: RunError("engine is gone"))
    affinities: set[str] = field(default_factory=set)
    names: list[str] = field(default_factory=list)

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        n: int,
        temperature: float,
        max_new_tokens: int,
        affinity: str = "",
        name: str = "",
    ) -> list[Generation]:
        if self.fail_after is not None and len(self.contexts) >= self.fail_after:
            raise self.failure
        start = len(self.contexts)
        self.affinities.add(affinity)
        self.names.append(name)
        self.contexts.append(list(input_ids))
        return [generation(self.texts[(start + i) % len(self.texts)]) for i in range(n)]


@dataclass
class ScriptedUser:
    """`answer(chat, sample_index)` gives the next user turn or raises."""

    answer: Callable[[Sequence[Message], int], str]
    asked: list[int] = field(default_factory=list)

    async def reply(self, task: Task, chat: Sequence[Message], *, sample_index: int) -> str:
        self.asked.append(sample_index)
        return self.answer(chat, sample_index)


@dataclass
class LengthScorer:
    """Scores the number of messages; `fail_if(conversation)` loses the judge."""

    fail_if: Callable[[ScoredConversation], bool] = lambda conversation: False
    seen: list[ScoredConversation] = field(default_factory=list)

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        self.seen.append(conversation)
        if self.fail_if(conversation):
            raise RunError("judge is gone")
        return {"accuracy": float(len(conversation.messages))}

    def reward(self, scores: dict[str, float]) -> float:
        return scores["accuracy"]


def players(engine: ScriptedEngine, user: ScriptedUser, scorer: LengthScorer | None = None) -> Players:
    return Players(
        engine=engine,
        user=user,
        scorer=scorer or LengthScorer(),
        chat=LetterChat(),
        engine_clock=BusyClock(),
        user_clock=BusyClock(),
        judge_clock=BusyClock(),
    )
