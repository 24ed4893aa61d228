"""The sections of the rollout: conversation trees, the driver, its journal and record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from collab_megatron.config.sections.base import Count, Positive, Seconds, Section

CutReply = Literal["score", "play", "penalty"]
EqualReplies = Literal["once", "pool", "apart"]
AUTO_FIRST = 2
"""Futures of a reply before `auto` looks at their spread: the fewest that have one."""


class RolloutSection(Section):
    """The shape of the conversation trees."""

    prompts_per_step: Positive = 16  # each grows one tree
    num_replies: Annotated[int, Field(ge=2)] = 8  # replies per prompt: the GRPO group
    # futures per reply; 0: score the reply without a future. auto: two of each reply, then one more at a time for
    # replies whose place in the group's ranking one more future can change, bounded by auto_futures
    num_repeat_rollouts: Count | Literal["auto"] = 3
    # num_repeat_rollouts: auto: a tree plays at most so many futures per reply of its group, and one reply at most
    # twice as many. The budget reserves that many
    auto_futures: Annotated[int, Field(ge=2)] = 3
    # replies of a group with the same token ids, which have the same expected reward. once: K futures are played for
    # the first of them, and all copies share them. pool: each plays its futures, and all get the mean over all. apart:
    # each has its own futures and reward, so that their advantages differ by the simulators' noise
    equal_replies: EqualReplies = "once"
    # futures of a group whose replies are all equal (equal_replies: once or pool): no reply of it can be better than
    # another. 1: the reward curves include such groups; 0: they have no reward. driver.refill_groups replaces them. Not
    # used with algorithm.credit: tree or baseline: batch, where such groups teach something
    uniform_group_futures: Annotated[int, Field(ge=0, le=1)] = 1
    max_user_turns: Count = 2  # user turns inside a future
    max_assistant_turns: Positive = 3  # policy turns of a conversation; the trained reply is the first
    max_new_tokens: Positive = 2048  # tokens of one policy turn
    # policy turns that reach max_new_tokens, end inside a thought, or are empty. score: the conversation ends and is
    # judged as it is, without another simulator call. play: the turn gets an end that the policy did not sample, and
    # the conversation continues. penalty: the conversation ends with cut_penalty and is not judged (the verl recipe
    # uses -1 if the trained reply is cut or empty)
    cut_reply: CutReply = "score"
    cut_penalty: float = -1.0  # reward R* of a conversation with cut_reply: penalty; one metric is clamped at -1
    # tags around the thoughts of a policy turn, which simulated users, judges and question counts never see
    thought_tags: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = (
        "<think>",
        "</think>",
    )
    max_prompt_tokens: Positive = 8192  # longer prompts are left out and counted
    # sampling temperature of training. The trainer divides its logits by it too, so that log-probs, KL and entropy
    # belong to the sampled distribution. If it is not 1, servers in engine.urls must run without
    # SGLANG_RETURN_ORIGINAL_LOGPROB=1
    temperature: float = Field(default=1.0, ge=0.01)
    # must be 1: a truncated distribution has no probability for tokens that the trainer's has, and engines report
    # log-probs of the full one
    top_p: float = 1.0
    top_k: int = -1  # must be -1 (all tokens), as top_p
    # chat templates for which appending token ids differs from rendering the whole chat (such as templates that remove
    # thoughts of earlier turns, or white space). refuse: stop with an error. as_sampled: append, so the policy sees its
    # turns as sampled. rendered: render the context of every turn after the trained reply again
    inexact_template: Literal["refuse", "as_sampled", "rendered"] = "refuse"
    min_replies: Annotated[int, Field(ge=2)] = 2  # a group with fewer scored replies is dropped

    @field_validator("num_repeat_rollouts", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        """One sentence instead of one for each type of the union."""
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{value!r} is neither a number of futures (0 or more) nor auto: set one of them")
        return value

    @property
    def first_futures(self) -> int:
        """Futures of each reply in the first round; 0: replies are scored without one."""
        return self.num_repeat_rollouts if isinstance(self.num_repeat_rollouts, int) else AUTO_FIRST

    @property
    def most_futures(self) -> int:
        """The most futures of one reply; a reply that is scored without a future counts as one."""
        fixed = self.num_repeat_rollouts
        return max(fixed, 1) if isinstance(fixed, int) else 2 * self.auto_futures

    @property
    def tree_futures(self) -> int:
        """The most futures of a tree."""
        fixed = self.num_repeat_rollouts
        return self.num_replies * (max(fixed, 1) if isinstance(fixed, int) else self.auto_futures)

    @model_validator(mode="after")
    def _whole_distribution(self) -> Self:
        """The trainer cannot compute log-probs of a truncated distribution."""
        if (self.top_p, self.top_k) != (1.0, -1):
            raise ValueError(
                f"top_p={self.top_p:g} and top_k={self.top_k} truncate the distribution, so the trainer cannot "
                "compute its log-probs: leave top_p=1 and top_k=-1, and lower rollout.temperature"
            )
        return self


class DriverSection(Section):
    """How conversation trees are grown, and how far ahead of the trainer."""

    shards: Positive = 1  # driver processes, which divide the prompts of a step
    max_staleness: Count = 0  # updates that a sampled token may be old; 0: strictly on-policy
    # with max_staleness: trees in flight beyond max_staleness batches, so that a step does not wait for its slowest
    # tree; unfinished trees continue in the next step. 0: prompts_per_step
    oversample_prompts: Count = 0
    # trees of a batch: the first that end, or in the order of prompts
    order: Literal["completion", "prompt"] = "completion"
    # deadline of one future, waiting for a free slot included. One request to an engine may take 1.5 times as long
    future_timeout_s: Seconds = 600.0
    # a tree is taken with the futures that are there, this long after its replies. A step may take the time of one
    # request more; then the run ends
    group_timeout_s: Seconds = 900.0
    # futures of a step (or evaluation) in one driver process that may end with an unexpected exception, each logged
    # with its traceback; one more stops the run after a save
    max_unexpected_errors: Count = 3
    min_futures: Positive = 1  # a reply with fewer scored futures is dropped from its group
    # trees per step that may replace dropped groups and groups below algorithm.min_group_std, which are then not
    # trained. Their prompts come from half an epoch later in the epoch's order
    refill_groups: Count = 0
    # of a driver process that died; it resumes from the journal. The count starts over when it has lived for half
    # an hour
    max_restarts: Count = 3
    # of the live page on 127.0.0.1; shard n uses the n-th port after it. 0: free ports; None: no page
    live_port: int | None = Field(default=0, ge=0, le=65535)

    @property
    def request_timeout_s(self) -> float:
        """Deadline of one generate call. Above a future's: a slow turn ends its future and leaves the engine in use."""
        return 1.5 * self.future_timeout_s

    @property
    def step_timeout_s(self) -> float:
        """Deadline of one step's rollouts: the replies, then their futures, and once more where groups are replaced."""
        return (self.request_timeout_s + self.group_timeout_s) * (2 if self.refill_groups else 1)


class JournalSection(Section):
    """SQLite file with every policy turn and every paid reply, written before use. A resume pays for none twice."""

    # auto: use the entries of the journal; only: a missing entry stops the run; off: ignore the entries
    replay: Literal["auto", "only", "off"] = "auto"
    # on a local disk; None: RUN_DIR/journal/NAME.sqlite. evaluate.py: NAME-WEIGHTS.sqlite in the same folder
    path: Path | None = None
    keep_all: bool = False  # false: remove entries that a checkpoint has made obsolete


class RecordSection(Section):
    """RUN_DIR/conversations/NAME: every conversation tree with its texts, tokens, scores and calls (docs/record.md)."""

    every: Positive = 1  # steps between recorded steps; the first step is always recorded
    # size limit of the run's whole record in MB; at the limit the run warns and continues without recording. None: no
    # limit
    max_mb: float | None = Field(default=20_000, gt=0)
    # compression of closed files (64 MB each); the open file, and so the record of a short run, is plain
    compress: Literal["zstd", "none"] = "zstd"
