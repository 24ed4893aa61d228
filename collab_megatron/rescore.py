"""Scores the recorded conversations of a run with another reward: what would its advantages have been?

    python -m collab_megatron.rescore conf/mine.yaml [section.key=value ...] --record RUN_DIR/conversations/NAME
        [--steps 5-20] [--again METRIC] [--output FILE]

The reward is that of the config (reward.*). A metric that the record has is read from it, whatever its settings are
now; --again asks for it again. A new metric scores each recorded conversation, its judges through the config's
simulators, budget and concurrency; an own journal keeps what was paid for, so an interrupted command goes on. Nothing
is sampled. Each prompt's task is looked up in data.train for what the record does not have, such as a metric's tests.

Prints what changes; --output gets the trees in the record's format (docs/record.md) with the new scores, rewards and
advantages of the replies. Advantages of later turns (algorithm.credit: tree) are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import orjson
import uvloop

from collab_megatron.concurrency import run_all
from collab_megatron.config import RLConfig, load_config
from collab_megatron.config.roles import llm_roles
from collab_megatron.config.sections import LLMSection
from collab_megatron.data.parquet import read_task_files
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_text
from collab_megatron.log import set_up_logging
from collab_megatron.rollout.group import GroupRules, with_other_scores
from collab_megatron.rollout.journal.store import open_journal
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.record_files import read_trees, steps_of
from collab_megatron.rollout.record_lines import tree_record
from collab_megatron.rollout.recorded_groups import group_of
from collab_megatron.rollout.rewards import configured_scorer, conversation_reward
from collab_megatron.rollout.rewards.scorer import Scorer
from collab_megatron.rollout.tree_grower import group_rules
from collab_megatron.types import Future, Group, Message, Reply, RolloutStatus, ScoredConversation, Task

AT_ONCE = 256  # replies whose trees are scored together; each role's own limit decides how many calls are in flight


@dataclass
class Changes:
    """What the new reward changes, over all trees."""

    trees: int = 0
    kept: int = 0
    best_changed: int = 0  # trees whose best reply is another one
    conversations: int = 0  # that were scored
    failed: int = 0  # by a judge, or by a metric that gave no number
    before: list[float] = field(default_factory=list)  # advantages of replies that have one in both
    after: list[float] = field(default_factory=list)
    rewards: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # MR of replies
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, old: Group, new: Group) -> None:
        """Count a tree."""
        self.trees, self.kept = self.trees + 1, self.kept + new.kept
        if old.kept and new.kept:
            self.best_changed += best(old) != best(new)
        for was, reply in zip(old.replies_G, new.replies_G, strict=True):
            if was.advantage is not None and reply.advantage is not None:
                self.before.append(was.advantage)
                self.after.append(reply.advantage)
            for values, value in zip(self.rewards, (was.mr, reply.mr), strict=True):
                values += [] if value is None else [value]
            for future in reply.futures_K:
                for name, score in future.scores.items():
                    self.scores.setdefault(name, []).append(score)

    def lines(self, weights: Mapping[str, float]) -> list[str]:
        """For the terminal."""
        old, new = (f"{fmean(values):.3f}" if values else "none" for values in self.rewards)
        found = [
            f"trees       {self.trees}, of which {self.kept} are kept",
            f"scored      {self.conversations} conversations, {self.failed} without a usable score",
            f"reward      {old} before, {new} now (mean MR of the replies)",
        ]
        found += [
            f"            {name} {fmean(values):.3f}, weight {weights[name]:g}" for name, values in self.scores.items()
        ]
        agree = "not defined"
        if len(set(self.before)) > 1 and len(set(self.after)) > 1:
            agree = f"{correlation(self.before, self.after):.3f}"
        turned = sum(a * b < 0 for a, b in zip(self.before, self.after, strict=True))
        found.append(f"advantages  correlation {agree}; {turned} of {len(self.before)} change their sign")
        return [*found, f"best reply  another one in {self.best_changed} of {self.trees} trees"]


def best(group: Group) -> int:
    """Index of the first reply with the highest reward; -1 without any."""
    scored = [(reply.mr, -place) for place, reply in enumerate(group.replies_G) if reply.mr is not None]
    return -max(scored)[1] if scored else -1


class Rescorer:
    """Scores futures of a record with the metrics that they lack."""

    def __init__(self, config: RLConfig, gateway: Gateway, again: Sequence[str], changes: Changes) -> None:
        self._config, self._gateway, self._again, self._changes = config, gateway, frozenset(again), changes
        self._weights, self._clamps = config.reward.metric_weights, config.reward.metric_clamps
        self._scorers: dict[frozenset[str], Scorer] = {}
        self._rules: GroupRules = group_rules(config)

    async def group(self, group: Group) -> Group:
        """The group with the reward of the config. Raises as a gateway does that must stop."""
        futures_G = await run_all(self._futures(group.task, reply) for reply in group.replies_G)
        new = with_other_scores(group, futures_G, self._rules)
        self._changes.add(group, new)
        return new

    async def _futures(self, task: Task, reply: Reply) -> list[Future]:
        return await run_all(self._future(task, reply, future) for future in reply.futures_K)

    async def _future(self, task: Task, reply: Reply, future: Future) -> Future:
        if not future.status.scored and future.status is not RolloutStatus.JUDGE_FAILED:
            return future
        if future.reward is not None and not future.scores:  # the penalty of a reply that breaks off
            return future
        scores = {name: future.scores[name] for name in self._weights if self._is_recorded(name, future)}
        missing = frozenset(self._weights) - frozenset(scores)
        if missing:
            conversation = ScoredConversation(
                task=task,
                messages=(*task.prompt, Message("assistant", reply.text), *future.messages),
                num_prompt_messages=len(task.prompt),
                policy_tokens=future.policy_tokens,
                sample_index=future.index,
            )
            self._changes.conversations += 1
            try:
                scores |= await self._scorer(missing).score(conversation)
            except SimulatorError as error:
                self._changes.failed += 1
                failed = RolloutStatus.JUDGE_FAILED
                return replace(future, status=failed, scores={}, reward=None, error=str(error))
        reward = conversation_reward(scores, self._weights, self._clamps)
        # how a conversation ended whose judge failed is not in the record; it is scored, however that was
        status = RolloutStatus.MAX_TURNS if future.status is RolloutStatus.JUDGE_FAILED else future.status
        return replace(future, status=status, scores=scores, reward=reward, error="")

    def _is_recorded(self, name: str, future: Future) -> bool:
        return name in future.scores and name not in self._again

    def _scorer(self, names: frozenset[str]) -> Scorer:
        if names not in self._scorers:
            section = self._config.reward.model_copy(
                update={"metric_weights": {name: self._weights[name] for name in self._weights if name in names}}
            )
            self._scorers[names] = configured_scorer(section, self._config.simulators, self._gateway)
        return self._scorers[names]


def asked_roles(config: RLConfig, rows: Sequence[Mapping[str, Any]], again: Sequence[str]) -> dict[str, LLMSection]:
    """The roles that may be asked, whose API keys must be there: none if the record has every score."""
    futures = [future for row in rows for reply in row["replies"] for future in reply["futures"]]
    recorded = all(set(config.reward.metric_weights) <= set(future["scores"]) for future in futures if future["scores"])
    failed = any(future["status"] == RolloutStatus.JUDGE_FAILED for future in futures)
    if recorded and not failed and not again:
        return {}
    roles = llm_roles(config.simulators, config.reward)
    return {name: section for name, section in roles.items() if name not in ("user", "assistant")}


async def rescore(
    config: RLConfig, rows: Sequence[Mapping[str, Any]], again: Sequence[str], journal_file: Path
) -> tuple[Changes, list[bytes]]:
    """What changes, and the lines of the new record."""
    tasks = {task.task_id: task for task in read_task_files(config.data.train_files)[0]}
    changes, lines = Changes(), list[bytes]()
    section = config.journal.model_copy(update={"path": None})
    with closing(open_journal(section, journal_file, "rescore")) as journal:
        gateway = Gateway(
            asked_roles(config, rows, again),
            config.run.seed,
            journal=journal,
            budget=config.budget,
            go_on="start the command again",
        )
        try:
            rescorer = Rescorer(config, gateway, again, changes)
            batch: list[Mapping[str, Any]] = []
            for row in rows:
                batch.append(row)
                if len(batch) * config.rollout.num_replies >= AT_ONCE:
                    lines += await _batch(rescorer, batch, tasks)
                    batch = []
            lines += await _batch(rescorer, batch, tasks)
            usage = gateway.snapshot()
            calls = sum(role.calls for role in usage.roles.values())
            print(f"calls       {calls}, ${usage.cost_usd:.4f}", flush=True)
        finally:
            await gateway.close()
    return changes, lines


async def _batch(rescorer: Rescorer, rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task]) -> list[bytes]:
    groups = await run_all(rescorer.group(group_of(row, tasks)) for row in rows)
    head = ("schema", "step", "begun_for_step", "slot", "replaced", "trained")
    return [
        orjson.dumps({**{key: row[key] for key in head if key in row}, **tree_record(group)})
        for row, group in zip(rows, groups, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m collab_megatron.rescore",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--record", type=Path, required=True, help="folder of the record")
    parser.add_argument("--steps", default="0-", help="7, 5-20 or 5-")
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        metavar="METRIC",
        help="score it again although recorded; may be repeated",
    )
    parser.add_argument("--output", type=Path, help="a new JSON lines file for the trees with the new scores")
    args = parser.parse_intermixed_args()
    set_up_logging("rescore")
    steps = steps_of(args.steps, "--steps")
    config = load_config(RLConfig, args.config, args.overrides)
    if unknown := sorted(set(args.again) - set(config.reward.metric_weights)):
        known = ", ".join(config.reward.metric_weights)
        raise UserError(
            f"--again {unknown[0]}: no metric of reward.metric_weights, which are {known}: name one of them"
        )
    if args.output is not None and args.output.exists():
        raise UserError(f"--output {args.output} exists: choose another file")
    rows = [row for row in read_trees(args.record) if row["step"] in steps]
    if not rows:
        where = f"of steps {args.steps}: name the folder RUN_DIR/conversations/NAME, and steps that the run has done"
        raise UserError(f"{args.record} has no trees {where}")
    journal = config.run.dir / "journal" / f"{config.run.name}-rescore.sqlite"
    changes, lines = uvloop.run(rescore(config, rows, args.again, journal))
    print("\n".join(changes.lines(config.reward.metric_weights)), flush=True)
    if args.output is not None:
        publish_text(args.output, b"\n".join([*lines, b""]).decode())
        print(f"trees       in {args.output}", flush=True)


if __name__ == "__main__":
    run_cli(main)
