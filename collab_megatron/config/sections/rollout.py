"""The sections of a rollout: conversation trees, the driver that grows them, its journal, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from collab_megatron.config.sections.base import Count, Positive, Seconds, Section, Seed

CutReply = Literal["score", "play", "penalty"]


class RolloutSection(Section):
    """The shape of the conversation trees."""

    prompts_per_step: Positive = 16
    num_replies: Annotated[int, Field(ge=2)] = 8  # n, the GRPO group
    num_repeat_rollouts: Count = 3  # K futures per reply; 0 scores the reply as it stands
    max_user_turns: Count = 2  # user turns inside a future
    max_assistant_turns: Positive = 3  # policy turns in all; the trained reply is the first
    max_new_tokens: Positive = 2048  # per policy turn
    # what to do with a policy turn that ran into max_new_tokens, ended inside a thought, or is empty. score: the
    # conversation ends with it and is judged as it stands, without another simulator call; play: the turn is closed
    # with an end that the policy never sampled, and the conversation goes on; penalty: it ends with cut_penalty and
    # nothing is judged (the verl recipe does so with -1, where the trained reply is cut or empty)
    cut_reply: CutReply = "score"
    cut_penalty: float = -1.0  # reward R* of such a conversation; one metric at its clamp is worth -1
    # what a policy turn's thoughts stand between: simulated users, judges and question counts never see them
    thought_tags: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = (
        "<think>",
        "</think>",
    )
    max_prompt_tokens: Positive = 8192  # longer prompts are left out and counted
    # of the sampling. The trainer divides its logits by the same number: log-probs, KL and entropy are of the
    # distribution that is sampled from. Evaluation has its own. Servers in engine.urls must not have been started with
    # SGLANG_RETURN_ORIGINAL_LOGPROB=1 where this is not 1
    temperature: float = Field(default=1.0, ge=0.01)
    # 1 and -1 (all tokens) only: a cut distribution gives no probability to tokens that the trainer's gives some, and
    # engines report log-probs of the uncut one
    top_p: float = 1.0
    top_k: int = -1
    # what to do where growing a chat by token ids differs from rendering it whole (a template that removes the thinking
    # of earlier turns, or white space). refuse: say so and stop; as_sampled: keep growing: the policy sees its turns
    # as it sampled them; rendered: the context of every turn after the trained reply is rendered again by the template
    inexact_template: Literal["refuse", "as_sampled", "rendered"] = "refuse"
    min_replies: Annotated[int, Field(ge=2)] = 2  # a group with fewer scored replies is dropped

    @model_validator(mode="after")
    def _whole_distribution(self) -> Self:
        """The trainer's log-probs cannot follow a distribution that is cut."""
        if (self.top_p, self.top_k) != (1.0, -1):
            raise ValueError(
                f"top_p={self.top_p:g} and top_k={self.top_k} would sample from a cut distribution, whose "
                "log-probs the trainer cannot compute: leave top_p=1 and top_k=-1, and lower rollout.temperature"
            )
        return self


class DriverSection(Section):
    """How conversation trees are grown, and how far ahead of the trainer."""

    shards: Positive = 1  # processes; they share the prompts of a step
    max_staleness: Count = 0  # s: up to s + 1 batches are under way; 0: strictly on-policy
    # with max_staleness: trees under way beyond max_staleness batches, so that a step need not wait for its slowest;
    # what is unfinished goes on in the next step. 0: a whole batch
    oversample_prompts: Count = 0
    order: Literal["completion", "prompt"] = "completion"  # which trees make a batch: the first that end, or by prompt
    # deadline of one future, waiting for a free slot included. One request to an engine may take 1.5 times as long
    future_timeout_s: Seconds = 600.0
    # a tree is taken with the futures that are there, this long after its replies. A step may take the time of one
    # request more; then the run ends
    group_timeout_s: Seconds = 900.0
    # futures of a step (of an evaluation) that may end with an exception that nobody foresaw, each logged with its
    # traceback, in one driver process; one more saves the run and stops it
    max_unexpected_errors: Count = 3
    min_futures: Positive = 1  # a reply with fewer scored futures leaves its group
    # trees per step that may be grown in place of dropped ones and of those without spread, which are then not trained;
    # their prompts stand half an epoch from the step's own in the epoch's order
    refill_groups: Count = 0
    max_restarts: Count = 3  # of a driver process that died; it goes on from the journal

    @property
    def request_timeout_s(self) -> float:
        """Deadline of one generate call. Above a future's: a slow turn ends its future and leaves the engine in use."""
        return 1.5 * self.future_timeout_s

    @property
    def step_timeout_s(self) -> float:
        """Deadline of one step's rollouts: the replies, then their futures."""
        return self.request_timeout_s + self.group_timeout_s


class JournalSection(Section):
    """Every policy turn and every paid reply, on disk before it is used (SQLite)."""

    # auto: what the journal has is not asked for again; only: a miss stops the run; off: all is asked again
    replay: Literal["auto", "only", "off"] = "auto"
    # on a local disk; None: RUN_DIR/journal/NAME.sqlite. evaluate.py: NAME-WEIGHTS.sqlite in the same folder
    path: Path | None = None
    keep_all: bool = False  # false: what a checkpoint has made obsolete is removed


class RecordSection(Section):
    """RUN_DIR/conversations/NAME: every conversation tree with its texts, tokens, scores and calls (docs/record.md)."""

    every: Positive = 1  # steps; 1: every step is written, n: the first and every n-th after it
    # MB on disk of the run's whole record; at the limit the run goes on, without more trees written, and says so. None:
    # no limit
    max_mb: float | None = Field(default=20_000, gt=0)
    # of the files, each closed after 64 MB; the one that is written to is plain, and so is a short run's whole record
    compress: Literal["zstd", "none"] = "zstd"


class EvaluationSection(Section):
    """Whole conversations on held-out tasks."""

    num_tasks: Positive = 1000  # at most; fewer if the file has fewer
    seed: Seed = 1  # which num_tasks of the file: the same at every step; a larger num_tasks adds to a smaller one
    # true: the simulated user writes the opening from the whole request, in place of the dataset's prompt (its system
    # message stays); of a file that has openings only those tasks are played
    simulated_opening: bool = False
    temperature: float = Field(default=0.0, ge=0)
    max_assistant_turns: Positive = 3
    max_concurrency: Positive = 64  # conversations at a time, over all shards
    timeout_s: Seconds = 1800.0  # deadline of the evaluation; what is under way then counts as failed
    # RL: held-out evaluations whose conversations stay in RUN_DIR/evaluations/NAME, the newest and the first of all
    keep_transcripts: Positive = 20
