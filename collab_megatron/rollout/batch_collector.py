"""Batch collector: turns the finished trees of a step into the answer to the trainer, with figures and records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from msgspec import structs

from collab_megatron.config import RLConfig
from collab_megatron.engine.pool_usage import PoolUsage
from collab_megatron.errors import RunError
from collab_megatron.figures import Figure, Figures, of_kind, values
from collab_megatron.rollout.clients import RolloutClients
from collab_megatron.rollout.delivered_batches import DeliveredBatches
from collab_megatron.rollout.group import tally, training_samples
from collab_megatron.rollout.hacking import hacking_metrics
from collab_megatron.rollout.llm import GatewaySnapshot
from collab_megatron.rollout.llm.health import share_figures
from collab_megatron.rollout.metrics import rollout_metrics, staleness_metrics
from collab_megatron.rollout.preference import preference_figures, preference_pair
from collab_megatron.rollout.record_files import RecordWriter
from collab_megatron.rollout.record_lines import tree_line
from collab_megatron.rollout.shown_trees import shown_trees
from collab_megatron.rollout.tree_grower import TreeGrower
from collab_megatron.rollout.tree_scheduler import Tree, TreeScheduler
from collab_megatron.types import Group, Message, TrainingSample
from collab_megatron.wire.protocol import Answer


class BatchCollector:
    """The batches of one shard. For every request: `begin`, then `take` until one of them returns the answer."""

    def __init__(self, config: RLConfig, clients: RolloutClients, grower: TreeGrower, recorder: RecordWriter) -> None:
        assert clients.journal is not None, "training has a journal"
        self._config, self._clients, self._grower, self._recorder = config, clients, grower, recorder
        self._journal = clients.journal
        self._delivered = DeliveredBatches(clients.journal, grower.plan.index, grower.plan.count)
        self._scheduler: TreeScheduler | None = None
        self._horizon = 0
        self._saved = 0
        self._counters = _Counters(clients)
        self.last: Batch | None = None

    def leave_out(self) -> None:
        """Leave what happened since the last batch out of the next one's counters: it belongs to an evaluation."""
        self._counters.restart()

    async def begin(self, step: int, version: int | None, saved: int) -> Answer | None:
        """Start the trees of `step`; weights `version` are live (None: nobody trains), and the newest checkpoint has
        `saved` steps.

        Returns the answer of a batch that was delivered before, else None.
        """
        rules = self._grower.scheduler_rules
        if saved > self._saved:
            self._saved = saved
            if not self._config.journal.keep_all:
                self._journal.prune(before_step=saved - rules.lookback)
        if self._scheduler is None:
            delivered, self._horizon = self._delivered.trees_around(step, rules.lookback)
            self._scheduler = TreeScheduler(
                self._grower.plan, rules, self._grower.grow, self._grower.reserve, step=step, delivered=delivered
            )
        await self.live(version)
        before = self._delivered.get(step)
        if before is None:
            self._scheduler.advance(step)
            return None
        return self._recorded(step, before.answer, before.unpacked())

    async def live(self, version: int | None) -> None:
        """Weights `version` are live."""
        await self._clients.engine.trainer_at(version, self._horizon)

    def take(self, step: int) -> Answer | None:
        """The batch of `step`; None while trees are missing. Starts trees for which the budget now has room.

        Raises RunError if groups have tokens older than allowed, and what the trees raise.
        """
        assert self._scheduler is not None, "begin comes first"
        if (stop := self._clients.players.unexpected.verdict()) is not None:
            self._scheduler.admitting = False  # the journal keeps what the running trees have paid for
            return Answer(error=stop, stop="errors")
        trees = self._scheduler.take(step)
        if trees is not None:
            return self._deliver(step, trees)
        spent = self._clients.gateway.budget.exhausted
        if spent is not None and self._scheduler.idle:
            return Answer(error=spent, stop="budget")
        self._scheduler.advance(step)
        return None

    def state(self) -> str:
        """What the current step waits for, for an error message."""
        assert self._scheduler is not None, "begin comes first"
        calls = {role: usage.in_flight for role, usage in self._clients.gateway.snapshot().roles.items()}
        calls_in_flight = ", ".join(f"{count} {role} calls" for role, count in calls.items())
        limiter = self._clients.engine_limiter
        return (
            f"{self._scheduler.num_running} trees are running with {calls_in_flight} in flight and {limiter.waiting} "
            "policy turns waiting for the engines"
        )

    @property
    def num_running(self) -> int:
        """Number of running trees."""
        return 0 if self._scheduler is None else self._scheduler.num_running

    async def changed(self, timeout_s: float) -> None:
        """Waits at most `timeout_s`. Unblocked by a tree that finishes or fails."""
        assert self._scheduler is not None, "begin comes first"
        await self._scheduler.changed(timeout_s)

    async def discard(self, step: int) -> None:
        """The trainer refused the batch of `step`: forget it and all trees. The next request makes another batch from
        the calls in the journal, with new calls in place of those that failed. Waits until the trees have ended."""
        self._delivered.remove(step)
        await self.close()
        self._scheduler = None

    async def close(self) -> None:
        """Cancel the running trees. Waits until they have ended."""
        if self._scheduler is not None:
            await self._scheduler.close()

    def _deliver(self, step: int, trees: Sequence[Tree]) -> Answer:
        groups = [tree.group for tree in trees if tree.group is not None]
        samples = tuple(sample for tree in trees for sample in self._samples(tree))
        if self._clients.engine.ages:
            _require_versions(samples, step, self._config.driver.max_staleness)
        warnings, sick = self._clients.health.verdict()
        if sick is not None:
            return Answer(error=sick, stop="health")
        notes = [*with_examples(warnings, self._clients.health.examples()), *self._clients.gateway.budget.warnings()]
        figures = self._figures(step, trees, groups)
        figures["rollout/samples"] = Figure.of("sum", [len(samples)])
        figures["rollout/trained_tokens"] = Figure.of("sum", [sum(len(sample.reply_ids_T) for sample in samples)])
        answer = Answer(
            samples=samples, figures=figures, notes=tuple(notes), tally=tally(groups), shown=shown_trees(groups)
        )
        self.last = Batch(step, values(figures), best_chat(groups))
        self._clients.players.unexpected.begin()
        wanted = self._recorder.wants(step + 1)
        lines = [self._line(step, tree, tree.group) for tree in trees if wanted and tree.group is not None]
        self._delivered.put(step, trees, answer, lines)
        return self._recorded(step, answer, lines)

    def _samples(self, tree: Tree) -> list[TrainingSample]:
        """The tree's training samples; with online_dpo a pair or none. A replaced tree has none: it has no learning
        signal, and would dilute the batch that its replacement completes."""
        if tree.group is None or tree.replaced:
            return []
        if self._config.online_dpo is not None:
            return preference_pair(tree.group, self._config.online_dpo)
        return training_samples(tree.group, self._config.algorithm.zero_advantage)

    def _line(self, step: int, tree: Tree, group: Group) -> bytes:
        trained = bool(self._samples(tree))
        return tree_line(step + 1, group, tree.id, replaced=tree.replaced, trained=trained)

    def _recorded(self, step: int, answer: Answer, lines: Sequence[bytes]) -> Answer:
        """Write the trees to the record, where steps count from 1 as on the dashboard; returns the answer."""
        note = self._recorder.write(step + 1, lines)
        return structs.replace(answer, notes=(*answer.notes, note)) if note else answer

    def _figures(self, step: int, trees: Sequence[Tree], groups: Sequence[Group]) -> Figures:
        now = time.monotonic()
        rollout_s = now - min(tree.started_s for tree in trees)
        health = self._clients.health.metrics()
        online = self._config.online_dpo
        return {
            **rollout_metrics(groups, self._config.reward.metric_weights, self._config.reward.metric_clamps),
            **hacking_metrics(groups, self._config.reward.metric_weights, self._config.reward.metric_clamps),
            **(preference_figures(groups, online) if online is not None else {}),
            **(staleness_metrics(groups, step) if self._clients.engine.ages else {}),
            "rollout/groups_replaced": Figure.of("sum", [sum(tree.replaced for tree in trees)]),
            "rollout/trees_carried_over": Figure.of("sum", [sum(tree.id.step < step for tree in trees)]),
            "time_s/rollout": Figure.of("max", [rollout_s]),
            **self._counters.since_last(rollout_s),
            **of_kind("sum", health),
            **share_figures(health),
            **of_kind("max", self._clients.gateway.budget.metrics()),
            **of_kind("max", self._journal.metrics()),
            "data/prompts_left_out": Figure.of("max", [self._grower.left_out]),  # every shard reads all prompts
            "data/prompts_left_out_share": Figure.of("max", [self._grower.left_out_share]),
        }


@dataclass(frozen=True)
class Batch:
    """What the live page shows of a batch."""

    step: int
    figures: Mapping[str, float]
    chat: tuple[tuple[str, str], ...]  # role and text of the best reply's conversation


def best_chat(groups: Sequence[Group]) -> tuple[tuple[str, str], ...]:
    """The last prompt message, the reply with the highest reward and its first future; empty without a scored reply."""
    scored = [(reply.mr, group, reply) for group in groups for reply in group.replies_G if reply.mr is not None]
    if not scored:
        return ()
    _, group, reply = max(scored, key=lambda each: each[0])
    messages = [*group.task.prompt[-1:], Message("assistant", reply.text), *reply.futures_K[0].messages]
    return tuple((message.role, message.content) for message in messages)


class _Counters:
    """Clocks and counters of the clients, as growth since the last batch."""

    def __init__(self, clients: RolloutClients) -> None:
        self._clients = clients
        self._before = self._now()

    def restart(self) -> None:
        """Leave out what happened since the last batch."""
        self._before = self._now()

    def since_last(self, rollout_s: float) -> Figures:
        """`rollout_s`: duration of the batch's trees. Tokens per second use this or the time since the last batch,
        whichever is shorter."""
        before, self._before = self._before, self._now()
        clocks, calls, usage, at, replayed = self._before
        clocks_before, calls_before, usage_before, at_before, replayed_before = before
        clients, seconds = self._clients, max(min(at - at_before, rollout_s), 1e-9)
        limiter = clients.engine_limiter
        return {
            **of_kind("max", {name: value - clocks_before[name] for name, value in clocks.items()}),
            **of_kind("sum", (calls - calls_before).metrics()),
            **usage.since(usage_before).figures(live=clients.pool.live, lost=len(clients.pool.lost), seconds=seconds),
            "engine/turns_replayed": Figure.of("sum", [replayed - replayed_before]),
            "engine/slots_tokens": Figure.of("sum", [limiter.limit]),
            "engine/slots_used_tokens": Figure.of("sum", [limiter.used]),
            "engine/slots_waiting": Figure.of("sum", [limiter.waiting]),
        }

    def _now(self) -> tuple[Mapping[str, float], GatewaySnapshot, PoolUsage, float, int]:
        players, clients = self._clients.players, self._clients
        clocks = {
            "time_s/engine": players.engine_clock.seconds(),
            "time_s/simulators": players.user_clock.seconds(),
            "time_s/judges": players.judge_clock.seconds(),
        }
        return clocks, clients.gateway.snapshot(), clients.pool.usage.copy(), time.monotonic(), clients.engine.replayed


def with_examples(warnings: Sequence[str], examples: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Each warning, followed by examples."""
    for warning in warnings:
        yield f"simulators: {warning}"
        for check, texts in examples.items():
            if f"({check}:" in warning:
                yield from (f"    {text}" for text in texts)


def _require_versions(samples: Sequence[TrainingSample], step: int, max_staleness: int) -> None:
    """Raises RunError for a token that was sampled by weights more than `max_staleness` updates old."""
    seen = {version for sample in samples for version in sample.versions_T}
    if seen and not (step - max_staleness <= min(seen) and max(seen) <= step):
        raise RunError(
            f"driver: step {step + 1} has tokens of weight versions {sorted(seen)}, which driver.max_staleness="
            f"{max_staleness} does not allow: report this bug, and resume"
        )
