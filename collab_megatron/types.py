"""The data contract: the types from a dataset row to a training sample.

    Task -> Reply (G per group) -> Future (K per reply) -> scores -> mr -> advantage -> TrainingSample

All are frozen dataclasses of plain values: they travel between processes as msgpack and go to disk as JSON. The
Protocols at the end are the driver's dependencies; tests pass small fakes, a run passes the real clients.

Ragged axes are suffixes of names:

    _G  replies of a group      replies_G            rollout.num_replies
    _K  futures of a reply      futures_K            rollout.num_repeat_rollouts
    _T  tokens                  token_ids_T          ids, log-probs and versions of one sequence have the same length
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")

TERMINATION_SIGNAL = "[TERMINATE]"
"""Default of simulators.user.termination_signal: a user turn that contains it ends the chat."""


class RolloutStatus(StrEnum):
    """How a future ended. Only the first three have scores; a failure is a status, never a score of zero.

    Example: RolloutStatus.TERMINATED.scored is True; RolloutStatus.JUDGE_FAILED.scored is False.
    """

    TERMINATED = "terminated"  # the simulated user ended the chat
    MAX_TURNS = "max_turns"  # the turn limits were reached
    TRUNCATED = "truncated"  # the policy reached its token limit: scored as it is
    SIMULATOR_FAILED = "simulator_failed"
    JUDGE_FAILED = "judge_failed"
    ENGINE_FAILED = "engine_failed"
    TIMED_OUT = "timed_out"  # it reached its own deadline
    LATE = "late"  # its group reached its deadline and was taken without it
    UNEXPECTED_ERROR = "unexpected_error"  # an exception without a handler; its traceback is in the driver's log

    @property
    def scored(self) -> bool:
        return self in (RolloutStatus.TERMINATED, RolloutStatus.MAX_TURNS, RolloutStatus.TRUNCATED)


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Example: Message("user", "Book a table for Friday.")
    """

    role: str  # system | user | assistant
    content: str

    def as_dict(self) -> dict[str, str]:
        """{"role": ..., "content": ...}: chat templates, APIs, rows and records hold messages like this."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Task:
    """One RL prompt: a chat history that ends with a user turn, and the request that only simulator and metrics know.

    Example: Task("t1", (Message("user", "Book a table."),), "Book a table for 4 on Friday at 8.", "Done: Friday, 8.")
    """

    task_id: str  # unique within its dataset
    prompt: tuple[Message, ...]  # system prompt first where there is one, user turn last
    single_turn_prompt: str  # the complete task, known to the simulator only
    ground_truth: str  # the reference answer
    task_desc: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the dataset's single_turn_metadata

    @property
    def ambiguous(self) -> bool | None:
        """Whether the opening leaves something out; None where the dataset does not record it."""
        return self.metadata.get("ambiguous")


@dataclass(frozen=True)
class Generation:
    """One sample of an engine for one context; a failed request has no ids.

    Example: Generation((523, 2), (-0.7, -0.1), (12, 12), "stop"): two tokens, both sampled with weight version 12.
    """

    token_ids_T: tuple[int, ...]  # sampled ids, the end-of-turn id included where it was sampled
    logprobs_T: tuple[float, ...]  # log-probability of each id in the distribution that it was drawn from
    versions_T: tuple[int, ...]  # weight version that sampled each id
    finish_reason: str  # stop | length
    cached_tokens: int = 0  # prompt tokens served from the engine's prefix cache
    replayed: bool = field(default=False, compare=False)  # from the journal: sampled before


@dataclass(frozen=True)
class PolicyTurn:
    """One policy turn: its ids as sampled, and its text, split into thought and reply.

    Example: sampled "<think>\\nno day yet\\n</think>\\n\\nWhich day?" has the thought "no day yet" and the reply
    "Which day?". Made by ChatTemplate.policy_turn (data/chat.py).
    """

    thought: str  # for the record only; empty without a thought
    reply: str  # seen by simulator, judges and metrics; empty if the turn ended inside a thought
    sampled: str  # the whole text, with an opening tag that is part of the prompt; input of the chat template
    cut: bool  # it reached its token limit, or ended inside a thought
    generation: Generation
    begin_s: float = 0.0  # epoch seconds of the request to the engine
    end_s: float = 0.0  # epoch seconds of its answer

    @property
    def broken(self) -> bool:
        """Whether the reply is cut or empty, so that a user cannot answer it."""
        return self.cut or not self.reply.strip()

    @property
    def num_tokens(self) -> int:
        return len(self.generation.token_ids_T)


@dataclass(frozen=True)
class CallRecord:
    """One call to a user simulator or judge, with all its attempts, for the record (docs/record.md).

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
    shared: bool = False  # the answer to an equal request at temperature 0: paid for once, by the call that sent it
    thought: str = ""  # of an answer in JSON
    marks: Mapping[str, Any] = field(default_factory=dict)  # its other plain values
    text: str = ""  # an answer that is not JSON
    error: str = ""  # why there is no answer


@dataclass(frozen=True)
class Future:
    """One simulated continuation of the conversation after a reply (a `session` of the CollabLLM datasets).

    Example: Future(0, RolloutStatus.TERMINATED, (Message("user", "Thanks. [TERMINATE]"),), {"accuracy": 1.0}, 1.0)
    """

    index: int  # 0..K-1
    status: RolloutStatus
    messages: tuple[Message, ...]  # the turns after the reply, user first
    scores: Mapping[str, float] = field(default_factory=dict)  # metric name -> raw score; empty if not scored
    reward: float | None = None  # weighted, clamped sum of the scores; None if not scored
    second_scores: Mapping[str, float] = field(default_factory=dict)  # of reward.second_judge, which does not reward
    policy_tokens: int = 0  # assistant tokens, the trained reply included
    versions: tuple[int, int] = (0, 0)  # lowest and highest weight version of its policy turns
    error: str = ""
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # metric name -> what it noted
    turns: tuple[PolicyTurn, ...] = ()  # the policy turns among `messages`, in order; the trained reply is not one
    # of each of `turns`, with algorithm.credit: tree: the token ids that it was sampled after, and its advantage (none
    # if the future was not scored, or its reply or group was dropped)
    contexts: tuple[tuple[int, ...], ...] = ()
    advantages: tuple[float | None, ...] = ()
    calls: tuple[CallRecord, ...] = ()  # to user and judges, in the order of their ends
    copied: bool = False  # played once, for an equal reply or for an earlier future of a broken one


@dataclass(frozen=True)
class Reply:
    """One sampled reply (step 1), its futures (step 2), its multiturn-aware reward (step 3) and advantage (step 4).

    Example: three futures with rewards 1.0, 0.5 and none (it timed out) have mr=0.75.
    """

    turn: PolicyTurn
    futures_K: tuple[Future, ...]
    mr: float | None = None  # mean reward of the scored futures; None without a scored future
    advantage: float | None = None  # None if the reply or its group was dropped
    same_as: int | None = None  # index of the first equal reply of the group, with which it shares its `mr`
    shaped_reward: float | None = None  # mr with overlong shaping, from which the advantage comes; None as mr

    @property
    def text(self) -> str:
        """The part that the user sees."""
        return self.turn.reply

    @property
    def thought(self) -> str:
        return self.turn.thought

    @property
    def generation(self) -> Generation:
        return self.turn.generation


@dataclass(frozen=True)
class Group:
    """One prompt's conversation tree: the G replies that GRPO compares.

    Example: rollout.num_replies=8 and num_repeat_rollouts=3 make groups of 8 replies with 3 futures each.
    """

    task: Task
    prompt_ids: tuple[int, ...]  # token ids of the context that the replies were sampled from
    replies_G: tuple[Reply, ...]
    kept: bool  # False: too few scored replies; not trained, and counted
    error: str = ""  # why its replies could not be sampled
    name: str = ""  # of its tree, unique in the run


@dataclass(frozen=True)
class TrainingSample:
    """One reply, or with algorithm.credit: tree any policy turn, as the trainer sees it: ids and numbers, no text.

    Example: TrainingSample((1, 40), (523, 2), (-0.7, -0.1), (12, 12), 0.8): a prompt of 2 and a reply of 2 tokens.
    """

    prompt_ids: tuple[int, ...]
    reply_ids_T: tuple[int, ...]
    rollout_logprobs_T: tuple[float, ...]
    versions_T: tuple[int, ...]
    # of the driver; the trainer changes it where it depends on the whole step (algorithm.scale, kl_in)
    advantage: float
    reward: float = 0.0  # of a reply: MR with overlong shaping
    group: str = ""  # samples with the same name are compared with each other


@dataclass(frozen=True)
class ShownTree:
    """A conversation tree as text for people. Example: ShownTree(0.7, "task chair-1: mean reward 0.700 ...")"""

    mr: float  # mean over its scored replies
    text: str


@dataclass(frozen=True)
class RolloutBatch:
    """The driver's result for one training step. With online_dpo samples 2i and 2i + 1 are the chosen and the rejected
    reply of pair i.

    Example: 16 prompts with 8 replies each, none dropped, make 128 samples.
    """

    step: int
    samples: tuple[TrainingSample, ...]
    metrics: Mapping[str, float]  # named as on the dashboard, e.g. "reward/mr_mean"
    shown: tuple[ShownTree, ...] = ()  # best, median and worst tree


@dataclass(frozen=True)
class LLMRequest(Generic[T]):
    """What a role of the LLM gateway (user, judge, assistant) is asked for: `n` values of type T.

    Example: LLMRequest([Message("user", "Is this kind? Answer 1 or 0.")], parse=float) asks for one number.
    """

    messages: Sequence[Message]
    # makes the value from a reply's text; ValueError for a text that cannot be used (empty, no JSON, a field missing):
    # the gateway counts it as malformed and asks again within the same retry budget
    parse: Callable[[str], T]
    sample_index: int = 0  # tells repeated requests with the same messages apart
    n: int = 1
    json_reply: bool = False  # the prompt asks for a JSON object; the role's config decides whether the API is told
    schema: Mapping[str, Any] | None = None  # JSON Schema of that object


@dataclass(frozen=True)
class LLMReply:
    """One answered API request, as the journal stores it.

    Example: two replies in one answer have texts ("yes", "no") and the tokens and dollars of both together.
    """

    texts: tuple[str, ...]  # malformed ones too; none if there is a `problem`
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float  # 0 if replayed
    latency_s: float = 0.0
    model: str = ""  # as the provider names it
    fingerprint: str = ""  # the provider's name for the build that answered (system_fingerprint)
    deployment: int = 0  # index of the role's deployment that answered
    problem: str = ""  # why the answer as a whole cannot be used: wrong_role | too_long; not stored
    replayed: bool = field(default=False, compare=False)  # it came from the journal: paid for before
    shared: bool = field(default=False, compare=False)  # the answer to an equal request of this process


class PolicyEngine(Protocol):
    """Samples policy turns: token ids in, token ids out.

    Example: await engine.generate(prompt_ids, n=8, temperature=1.0, max_new_tokens=2048) returns 8 generations.
    """

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
        """n continuations of `input_ids`. Requests with the same `affinity` (the prompt's name) share prefixes; `name`
        identifies the turn in the run.

        Raises NoEngineLeft without a live server, which ends the step; another RunError if this request was refused or
        missed its deadline.
        """
        ...


class ChatLLM(Protocol):
    """One role of the LLM gateway."""

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        """The request's `n` values.

        Raises SimulatorError (collab_megatron.rollout.llm) once the retry budget is spent.
        """
        ...


class UserSimulator(Protocol):
    """Plays the user of a conversation.

    Example: await user.reply(task, chat, sample_index=0) returns "For four people, please."
    """

    async def reply(self, task: Task, chat: Sequence[Message], *, sample_index: int) -> str:
        """The next user turn; contains the termination signal when the user ends the chat. Raises SimulatorError."""
        ...


@dataclass(frozen=True)
class ScoredConversation:
    """The input of a metric: the whole finished conversation.

    Example: a prompt of 1 message, the trained reply and a future of 2 messages have num_prompt_messages=1 of 4.
    """

    task: Task
    messages: tuple[Message, ...]  # prompt, reply and future, in order
    num_prompt_messages: int  # messages[:num_prompt_messages] is the prompt; the trained reply follows
    policy_tokens: int  # assistant tokens, the trained reply included
    sample_index: int = 0

    @property
    def last_assistant(self) -> str:
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


@dataclass(frozen=True)
class Score:
    """A metric's result with details for the record. A metric without details may return the number alone.

    Example: Score(0.0, {"passed": 3, "tests": 4, "first_error": "AssertionError"})
    """

    value: float  # finite
    details: Mapping[str, Any] = field(default_factory=dict)  # plain values; long texts are cut


@dataclass(frozen=True)
class NoScore:
    """A metric's failure: the conversation cannot be scored and leaves the mean; it never counts as 0.

    Example: NoScore("the task has no tests")
    """

    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


MetricResult = float | Score | NoScore


class Metric(Protocol):
    """One conversation-level metric; all metrics of a conversation run at the same time.

    Example: docs/rewards.md has a metric of one class and one decorator.
    """

    name: str

    def score(self, conversation: ScoredConversation) -> MetricResult | Awaitable[MetricResult]:
        """The raw score: `async def` for a metric that waits, a plain function for one that counts.

        Raises SimulatorError if the judge does not answer.
        """
        ...
