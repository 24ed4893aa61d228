"""The data contract: what flows from a dataset row to a gradient.

    Task -> Reply[n] -> Future[n][K] -> metric scores -> MR -> advantage -> TrainingSample

Everything here is a frozen dataclass of plain values: it travels between processes as msgpack and onto disk as JSON.
Ragged axes are named by suffix: G replies of a group, K futures of a reply, M metrics, T tokens.
The Protocols at the end are what the driver is given; a test gives it small fakes, a run the real clients.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

TERMINATION_SIGNAL = "[TERMINATE]"
"""How a simulated user ends the chat unless `simulators.user.termination_signal` sets another string."""


class RolloutStatus(StrEnum):
    """How a future ended. Only the first three carry scores; a failure is a status, never a score of zero."""

    TERMINATED = "terminated"  # the simulated user ended the chat
    MAX_TURNS = "max_turns"  # the turn limits were reached
    TRUNCATED = "truncated"  # the policy ran into its token limit: scored as it stands
    SIMULATOR_FAILED = "simulator_failed"
    JUDGE_FAILED = "judge_failed"
    ENGINE_FAILED = "engine_failed"
    TIMED_OUT = "timed_out"  # it reached its own deadline
    LATE = "late"  # its group reached its deadline and was taken without it
    UNEXPECTED_ERROR = "unexpected_error"  # an exception that nobody foresaw; its traceback stands in the driver's log

    @property
    def scored(self) -> bool:
        return self in (RolloutStatus.TERMINATED, RolloutStatus.MAX_TURNS, RolloutStatus.TRUNCATED)


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # system | user | assistant
    content: str

    def as_dict(self) -> dict[str, str]:
        """{"role": ..., "content": ...}: chat templates, APIs, rows and records hold messages like this."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Task:
    """One RL prompt: a chat history that ends with a user turn, and what simulator and metrics know beyond it."""

    task_id: str  # unique within its dataset
    prompt: tuple[Message, ...]  # system prompt first where there is one, user turn last
    single_turn_prompt: str  # the complete task, known to the simulator only
    ground_truth: str  # the reference answer
    task_desc: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)  # single_turn_metadata

    @property
    def ambiguous(self) -> bool | None:
        """Whether the opening leaves something out; None where the dataset does not say."""
        return self.metadata.get("ambiguous")


@dataclass(frozen=True)
class Generation:
    """What an engine sampled for one context. Without ids it is a failed request."""

    token_ids_T: tuple[int, ...]  # sampled ids, the end-of-turn id included where it was sampled
    logprobs_T: tuple[float, ...]  # log-probability of each id in the distribution that it was drawn from
    versions_T: tuple[int, ...]  # weight version that sampled each id
    finish_reason: str  # stop | length
    cached_tokens: int = 0  # prompt tokens served from the engine's prefix cache
    replayed: bool = field(default=False, compare=False)  # it came from the journal: sampled before


@dataclass(frozen=True)
class PolicyTurn:
    """One policy turn: its ids as they were sampled, and its text, split once into thought and reply.

    Example: sampled "<think>\\nno day yet\\n</think>\\n\\nWhich day?" has the thought "no day yet" and the reply
    "Which day?". Made by ChatTemplate.policy_turn (data/chat.py).
    """

    thought: str  # for the record only; empty if it thought nothing
    reply: str  # what simulator, judges and metrics see; empty if the turn ended inside a thought
    sampled: str  # the whole text, an opening tag that the prompt brought included: what a template is given
    cut: bool  # it ran into its token limit, or ended inside a thought
    generation: Generation
    begin_s: float = 0.0  # epoch seconds when the engine was asked, and when it had answered
    end_s: float = 0.0

    @property
    def broken(self) -> bool:
        """Whether a user would have nothing whole to answer: cut or empty."""
        return self.cut or not self.reply.strip()

    @property
    def num_tokens(self) -> int:
        return len(self.generation.token_ids_T)


@dataclass(frozen=True)
class CallRecord:
    """One call to a user simulator or judge, with all its attempts, for the record (docs/RECORD.md).

    Example: the judge of `interactivity` answered {"thought": "it asked", "understanding": 1, ...}: `metric` is
    "interactivity", `thought` "it asked" and `marks` {"understanding": 1, ...}.
    """

    role: str  # user, judge, ...; of a mixture's further users user-1, user-2, ...
    model: str  # as the config names it
    begin_s: float  # epoch seconds when it was asked for, the wait for a free slot included
    end_s: float
    metric: str = ""  # that asked; empty for a user
    answered_by: str = ""  # what the provider calls its model
    requests: int = 0  # sent to the provider; 0: all came from the journal
    replayed: bool = False  # the answer came from the journal: paid for before
    prompt_tokens: int = 0  # of all answers, those that could not be used included
    completion_tokens: int = 0
    cost_usd: float = 0.0
    thought: str = ""  # of an answer in JSON
    marks: Mapping[str, Any] = field(default_factory=dict)  # its other plain values
    text: str = ""  # an answer that is not JSON
    error: str = ""  # why there is no answer


@dataclass(frozen=True)
class Future:
    """One simulated rest of the conversation after a reply (a `session` of the CollabLLM datasets)."""

    index: int  # 0..K-1
    status: RolloutStatus
    messages: tuple[Message, ...]  # the turns after the reply, user first
    scores: Mapping[str, float] = field(default_factory=dict)  # metric name -> raw score; empty if not scored
    reward: float | None = None  # weighted, clamped sum of the scores; None if not scored
    policy_tokens: int = 0  # assistant tokens from the trained reply on
    versions: tuple[int, int] = (0, 0)  # lowest and highest weight version of its policy turns
    error: str = ""
    turns: tuple[PolicyTurn, ...] = ()  # the policy turns among `messages`, in order; the trained reply is not one
    calls: tuple[CallRecord, ...] = ()  # to user and judges, in the order in which they ended


@dataclass(frozen=True)
class Reply:
    """One sampled reply (step 1), its futures (step 2), its multiturn-aware reward (step 3) and advantage (step 4)."""

    turn: PolicyTurn
    futures_K: tuple[Future, ...]
    mr: float | None = None  # mean reward over the scored futures; None if none is left
    advantage: float | None = None  # None if the reply or its group was dropped

    @property
    def text(self) -> str:
        """What the user sees."""
        return self.turn.reply

    @property
    def thought(self) -> str:
        return self.turn.thought

    @property
    def generation(self) -> Generation:
        return self.turn.generation


@dataclass(frozen=True)
class Group:
    """One prompt's conversation tree: the n replies that GRPO compares."""

    task: Task
    prompt_ids: tuple[int, ...]  # the token ids the replies were sampled from
    replies_G: tuple[Reply, ...]
    kept: bool  # False: too few scored replies; trains nothing and is counted
    error: str = ""  # why its replies could not be sampled


@dataclass(frozen=True)
class TrainingSample:
    """One reply as the trainer sees it: ids and numbers, no text."""

    prompt_ids: tuple[int, ...]
    reply_ids_T: tuple[int, ...]
    rollout_logprobs_T: tuple[float, ...]
    versions_T: tuple[int, ...]
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids_T)


@dataclass(frozen=True)
class RolloutBatch:
    """What the driver hands to the trainer for one step."""

    step: int
    samples: tuple[TrainingSample, ...]
    metrics: Mapping[str, float]  # names as they stand on the dashboard, e.g. "reward/mr_mean"


@dataclass(frozen=True)
class LLMReply:
    """A simulator's or judge's answer."""

    text: str
    cost_usd: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    model: str = ""  # what the provider says that it was
    fingerprint: str = ""  # the provider's name for the version that answered
    replayed: bool = False  # it came from the journal: paid for before


class PolicyEngine(Protocol):
    """Samples policy turns: token ids in, token ids out."""

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
        """n continuations of `input_ids`; requests of one `affinity` (the prompt's name) share prefixes; `name` is the
        turn's own in the run.

        Raises NoEngineLeft when no server is there to ask, which ends the step; another RunError if this request was
        refused or not answered within its deadline.
        """
        ...


class ChatLLM(Protocol):
    """One role of the LLM gateway (user, judge, assistant)."""

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sample_index: int = 0,
        n: int = 1,
        json_reply: bool = False,
        schema: Mapping[str, Any] | None = None,
        check: Callable[[str], object] | None = None,
    ) -> list[LLMReply]:
        """n replies. `sample_index` tells apart repeated calls with the same messages.

        `json_reply` says that the prompt wants a JSON object, `schema` (JSON Schema) which one; whether the provider
        is told, the role's config says.

        `check` raises ValueError for a text that cannot be used (empty, no JSON, a field missing): the gateway counts
        it as malformed and asks again inside the same retry budget.
        Raises SimulatorError (collab_megatron.rollout.llm.gateway) once the retry budget is spent.
        """
        ...


class UserSimulator(Protocol):
    """Plays the user of a conversation."""

    async def reply(self, task: Task, chat: Sequence[Message], *, sample_index: int) -> str:
        """The next user turn; contains the termination signal when the user ends the chat. Raises SimulatorError."""
        ...


@dataclass(frozen=True)
class ScoredConversation:
    """What a metric sees: the whole finished conversation."""

    task: Task
    messages: tuple[Message, ...]  # prompt, reply and future, in order
    num_prompt_messages: int  # messages[:num_prompt_messages] is the prompt; the trained reply follows
    policy_tokens: int  # assistant tokens from the trained reply on
    sample_index: int = 0

    @property
    def last_assistant(self) -> str:
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


class Metric(Protocol):
    """One conversation-level metric; all metrics of a conversation are awaited at the same time."""

    name: str

    def score(self, conversation: ScoredConversation) -> float | Awaitable[float]:
        """The raw score, a finite number; `async def` for one that waits, a plain function for one that counts.

        Raises SimulatorError if a judge could not be had.
        """
        ...
