"""Recorded conversations as batches: what a driver would deliver, made of a record in place of new conversations.

    record ---> groups ---> rewards and advantages under the config ---> samples, figures

Rewards come from the recorded scores, with the config's weights and clamps; advantages from the code of training
(group.py), so another algorithm may be used. Token ids and log-probs are those of the record. What the record does not
have is computed exactly or refused: the context of a later turn (algorithm.credit: tree) is grown again by the model's
chat template, which must give the recorded prompts and texts.

Samples have no weight versions (UNPUBLISHED): other weights than those of this run may have sampled them, so nothing
counts as on-policy. Figures of the conversations are named recorded/..., because they are not of the policy in
training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import RewardSection
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.engine.client import UNPUBLISHED
from collab_megatron.errors import UserError
from collab_megatron.figures import values
from collab_megatron.rollout.group import training_samples, with_other_scores, with_turn_credit
from collab_megatron.rollout.hacking import hacking_metrics
from collab_megatron.rollout.metrics import rollout_metrics
from collab_megatron.rollout.preference import preference_figures, preference_pair
from collab_megatron.rollout.record_files import read_lines, read_trees, steps_of
from collab_megatron.rollout.record_lines import SCHEMA
from collab_megatron.rollout.recorded_groups import group_of
from collab_megatron.rollout.rewards import conversation_reward
from collab_megatron.rollout.shown_trees import shown_trees
from collab_megatron.rollout.tree_grower import group_rules
from collab_megatron.types import Future, Group, Message, PolicyTurn, Reply, RolloutBatch, TrainingSample

PREFIX = "recorded/"
CHECKED_TREES = 64  # whose prompts are rendered again, to see that the model's template made them


@dataclass(frozen=True)
class RecordSize:
    """What a replay trains on."""

    path: Path
    steps: int
    trees: int
    samples: int  # policy turns
    longest: int  # tokens of the longest sample, its prompt included


class Replay:
    """The recorded steps of a config as batches. Reads one step at a time."""

    def __init__(self, config: RLConfig, chat: ChatTemplate) -> None:
        """chat: of the model that is trained. Raises UserError where there is no record."""
        assert config.replay is not None, "the config replays"
        self._config, self._chat, self._rules = config, chat, group_rules(config)
        self._path = find_record(config.replay.record)
        self._steps, self._given = steps_of(config.replay.steps, "replay.steps"), config.replay.steps

    def batches(self, first: int) -> Iterator[RolloutBatch]:
        """The batches of training steps `first`, `first` + 1, and so on, from 0; after the last recorded step comes the
        first one again. Raises UserError for a line that cannot be used."""
        number, length = 0, 0
        for passes in itertools.count(1):
            begin = number
            for rows in self._rows():
                if number >= first:
                    yield self._batch(number, passes, rows)
                number += 1
            length = length or number - begin
            if number < first:
                number += (first - number) // length * length  # whole passes of an earlier attempt

    def size(self) -> RecordSize:
        """Reads all recorded steps once. Raises UserError as `batches` does, and for samples that another tokenizer or
        chat template made."""
        steps, trees, samples, longest = 0, 0, 0, 0
        for rows in self._rows():
            for group in map(self._group, rows):
                if trees < CHECKED_TREES:
                    self._check_prompt(group)
                trees += 1
            found = self._batch(steps, 1, rows).samples
            longest = max([longest, *(len(sample.prompt_ids) + len(sample.reply_ids_T) for sample in found)])
            steps, samples = steps + 1, samples + len(found)
        return RecordSize(self._path, steps, trees, samples, longest)

    def num_steps(self) -> int:
        """Recorded steps."""
        return sum(1 for _ in self._rows())

    def _rows(self) -> Iterator[list[Mapping[str, Any]]]:
        """The trees of each chosen step. Raises UserError if there are none."""
        trees = read_trees(self._path) if self._path.is_dir() else read_lines(self._path)
        chosen = (row for row in trees if row["step"] in self._steps)
        found = False
        for _, rows in itertools.groupby(chosen, key=lambda row: row["step"]):
            found = True
            yield list(rows)
        if not found:
            raise UserError(f"{self._path} has no trees of replay.steps={self._given}: choose steps that it has")

    def _batch(self, number: int, passes: int, rows: Sequence[Mapping[str, Any]]) -> RolloutBatch:
        groups = [self._group(row) for row in rows]
        reward, online = self._config.reward, self._config.online_dpo
        figures = {
            **rollout_metrics(groups, reward.metric_weights, reward.metric_clamps),
            **hacking_metrics(groups, reward.metric_weights, reward.metric_clamps),
            **(preference_figures(groups, online) if online is not None else {}),
        }
        samples = [
            sample for row, group in zip(rows, groups, strict=True) if not row["replaced"] for sample in self._of(group)
        ]
        metrics = {f"{PREFIX}{name}": value for name, value in values(figures).items()}
        metrics |= {"replay/recorded_step": float(rows[0]["step"]), "replay/pass": float(passes)}
        return RolloutBatch(number, tuple(samples), metrics, shown_trees(groups))

    def _of(self, group: Group) -> Iterator[TrainingSample]:
        """Its samples. Raises UserError for one without log-probs."""
        online, zero = self._config.online_dpo, self._config.algorithm.zero_advantage
        for sample in training_samples(group, zero) if online is None else preference_pair(group, online):
            tokens = len(sample.reply_ids_T)
            if len(sample.rollout_logprobs_T) != tokens:
                raise UserError(
                    f"{self._path}: the tree {group.name} has tokens without log-probs, as an API model's have: replay "
                    "a record of train_rl or collect"
                )
            yield replace(sample, versions_T=(UNPUBLISHED,) * tokens)

    def _group(self, row: Mapping[str, Any]) -> Group:
        """A recorded tree under the config's reward and algorithm."""
        if row.get("schema") != SCHEMA or "slot" not in row:
            raise UserError(
                f"{self._path}: a line of step {row['step']} is no tree of training with schema {SCHEMA}: name a "
                "record of train_rl or collect (docs/record.md), not the conversations of an evaluation"
            )
        try:
            name = f"{row['begun_for_step'] - 1}/{row['slot']}"
            group = replace(group_of(row, {}), name=name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self._path}: a tree of step {row['step']} is not as docs/record.md says ({type(error).__name__}: "
                f"{error}): another version of collab_megatron wrote it, or it was changed"
            ) from None
        futures_G = [[self._rewarded(future, name) for future in reply.futures_K] for reply in group.replies_G]
        found = with_other_scores(group, futures_G, self._rules)
        if self._config.algorithm.credit == "reply" or not found.kept:
            return found
        return with_turn_credit(self._with_contexts(found), self._rules)

    def _rewarded(self, future: Future, tree: str) -> Future:
        """The future with the config's reward of its recorded scores."""
        if not future.scores:  # it failed, or it has the penalty of a reply that breaks off
            return future
        reward: RewardSection = self._config.reward
        if missing := sorted(set(reward.metric_weights) - set(future.scores)):
            raise UserError(
                f"{self._path}: the tree {tree} has no score of {missing[0]}, which reward.metric_weights names: score "
                "the record with `python -m collab_megatron.rescore ... --output FILE` and replay FILE, or set "
                f"reward.metric_weights.{missing[0]}=null"
            )
        return replace(future, reward=conversation_reward(future.scores, reward.metric_weights, reward.metric_clamps))

    def _with_contexts(self, group: Group) -> Group:
        """The group with the ids before each later policy turn, grown as in sampling. Raises UserError where the
        model's tokenizer and chat template do not give what is recorded."""
        self._check_prompt(group)
        replies = [
            replace(
                reply,
                futures_K=tuple(replace(f, contexts=self._contexts(group, reply, f)) for f in reply.futures_K),
            )
            for reply in group.replies_G
        ]
        return replace(group, replies_G=tuple(replies))

    def _contexts(self, group: Group, reply: Reply, future: Future) -> tuple[tuple[int, ...], ...]:
        sampled, context, found = list(group.task.prompt), list(group.prompt_ids), list[tuple[int, ...]]()

        def add(turn: PolicyTurn) -> None:
            again = self._chat.policy_turn(context, turn.generation)
            if again.reply != turn.reply:
                raise self._other_template(group)
            sampled.append(Message("assistant", again.sampled))
            context.extend(turn.generation.token_ids_T)

        add(reply.turn)
        turns = iter(future.turns)
        for message in future.messages:
            if message.role == "user":
                context = self._chat.grow(context, sampled, message.content)
                sampled.append(message)
                continue
            found.append(tuple(context))
            add(next(turns))
        return tuple(found)

    def _check_prompt(self, group: Group) -> None:
        if group.replies_G and self._chat.prompt_ids(group.task.prompt) != list(group.prompt_ids):
            raise self._other_template(group)

    def _other_template(self, group: Group) -> UserError:
        return UserError(
            f"{self._path}: the tokenizer and chat template of model.path={self._config.model.path} do not give the "
            f"token ids of the tree {group.name}: train the model that the record was sampled with, or one with the "
            "same tokenizer and template"
        )


def open_replay(config: RLConfig) -> Replay:
    """The replay of a config, with the tokenizer of model.path. Raises UserError as Replay does."""
    chat = ChatTemplate(load_tokenizer(config.model.path), thought_tags=config.rollout.thought_tags)
    chat.check_growth(config.rollout.inexact_template)
    return Replay(config, chat)


def find_record(path: Path) -> Path:
    """A file of trees, or the folder of shard*.jsonl in or at `path`. Raises UserError."""
    if path.is_file():
        return path
    if any(path.glob("shard*.jsonl*")):
        return path
    found = sorted(folder for folder in path.glob("conversations/*") if any(folder.glob("shard*.jsonl*")))
    if len(found) == 1:
        return found[0]
    names = (
        f"it has those of several runs, name one of {', '.join(map(str, found))}"
        if found
        else ("name RUN_DIR/conversations/NAME, or a file that rescore has written")
    )
    raise UserError(f"replay.record={path} is no record of conversations: {names}")
