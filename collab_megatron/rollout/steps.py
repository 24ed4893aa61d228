"""The batches of a driver process: from the trainer's request for a step to the answer, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from msgspec import structs

from collab_megatron.config import RLConfig
from collab_megatron.engine.pool_usage import PoolUsage
from collab_megatron.errors import RunError
from collab_megatron.rollout.cast import Cast
from collab_megatron.rollout.deliveries import Deliveries
from collab_megatron.rollout.forest import Forest, Tree
from collab_megatron.rollout.group import tally, training_samples
from collab_megatron.rollout.llm import GatewaySnapshot
from collab_megatron.rollout.llm.health import parts_of_shares
from collab_megatron.rollout.metrics import rollout_metrics, staleness_metrics
from collab_megatron.rollout.record import tree_line
from collab_megatron.rollout.recorder import TreeRecorder
from collab_megatron.rollout.work import Work
from collab_megatron.types import Group, TrainingSample
from collab_megatron.wire.figures import Figure, Figures, of_kind
from collab_megatron.wire.protocol import Answer


class Steps:
    """One shard's. `begin` for every request, then `take` until one of them answers."""

    def __init__(self, config: RLConfig, cast: Cast, work: Work, recorder: TreeRecorder) -> None:
        assert cast.journal is not None, "training has a journal"
        self._config, self._cast, self._work, self._recorder = config, cast, work, recorder
        self._journal = cast.journal
        self._deliveries = Deliveries(cast.journal, work.shard.index, work.shard.count)
        self._forest: Forest | None = None
        self._horizon = 0
        self._saved = 0
        self._counters = _Counters(cast)

    async def begin(self, step: int, version: int, saved: int) -> Answer | None:
        """The trainer asks for `step`; weights `version` are live, and a checkpoint holds `saved` steps.

        The answer, where the batch was delivered before.
        """
        rules = self._work.forest_rules
        if saved > self._saved:
            self._saved = saved
            if not self._config.journal.keep_all:
                self._journal.prune(before_step=saved - rules.lookback)
        if self._forest is None:
            delivered, self._horizon = self._deliveries.trees_around(step, rules.lookback)
            self._forest = Forest(
                self._work.shard, rules, self._work.grow, self._work.reserve, step=step, delivered=delivered
            )
        await self.live(version)
        before = self._deliveries.get(step)
        if before is None:
            self._forest.advance(step)
            return None
        return self._recorded(step, before.answer, before.unpacked())

    async def live(self, version: int) -> None:
        """Weights `version` are live."""
        await self._cast.recorded.trainer_at(version, self._horizon)

    def take(self, step: int) -> Answer | None:
        """The batch of `step`; None as long as trees are missing. Trees for which the budget has room by now begin.

        Raises RunError if groups hold tokens older than allowed; what the trees raise.
        """
        assert self._forest is not None, "begin comes first"
        if (stop := self._cast.players.unexpected.verdict()) is not None:
            self._forest.admitting = False  # what the trees under way have cost is in the journal
            return Answer(error=stop, stop="errors")
        trees = self._forest.take(step)
        if trees is not None:
            return self._deliver(step, trees)
        spent = self._cast.gateway.budget.exhausted
        if spent is not None and self._forest.idle:
            return Answer(error=spent, stop="budget")
        self._forest.advance(step)
        return None

    def state(self) -> str:
        """A few words on what is being waited for."""
        assert self._forest is not None, "begin comes first"
        calls = {role: usage.in_flight for role, usage in self._cast.gateway.snapshot().roles.items()}
        said = ", ".join(f"{count} {role} calls" for role, count in calls.items())
        slots = self._cast.engine_slots
        return (
            f"{self._forest.under_way} trees are under way with {said} in flight and {slots.waiting} policy turns "
            "waiting for the engines"
        )

    async def changed(self, timeout_s: float) -> None:
        assert self._forest is not None, "begin comes first"
        await self._forest.changed(timeout_s)

    async def discard(self, step: int) -> None:
        """The trainer refused the batch of `step`: whoever asks for it again gets another, made of the calls that the
        journal knows and of new ones in place of those that failed."""
        self._deliveries.remove(step)
        await self.close()
        self._forest = None

    async def close(self) -> None:
        if self._forest is not None:
            await self._forest.close()

    def _deliver(self, step: int, trees: Sequence[Tree]) -> Answer:
        groups = [tree.group for tree in trees if tree.group is not None]
        samples = tuple(sample for tree in trees for sample in self._samples(tree))
        _require_versions(samples, step, self._config.driver.max_staleness)
        warnings, sick = self._cast.health.verdict()
        if sick is not None:
            return Answer(error=sick, stop="health")
        notes = [*with_examples(warnings, self._cast.health.examples()), *self._cast.gateway.budget.warnings()]
        figures = self._figures(step, trees, groups)
        figures["rollout/samples"] = Figure.of("sum", [len(samples)])
        answer = Answer(samples=samples, figures=figures, notes=tuple(notes), tally=tally(groups))
        self._cast.players.unexpected.begin()
        wanted = self._recorder.wants(step + 1)
        lines = [self._line(step, tree, tree.group) for tree in trees if wanted and tree.group is not None]
        self._deliveries.put(step, trees, answer, lines)
        return self._recorded(step, answer, lines)

    def _samples(self, tree: Tree) -> list[TrainingSample]:
        """What the trainer is given of a tree: of a replaced one nothing, for it has taught nothing, another fills its
        place, and it would thin out the others."""
        if tree.group is None or tree.replaced:
            return []
        return training_samples(tree.group, self._config.algorithm.zero_advantage)

    def _line(self, step: int, tree: Tree, group: Group) -> bytes:
        trained = bool(self._samples(tree))
        return tree_line(step + 1, group, tree.seat, replaced=tree.replaced, trained=trained)

    def _recorded(self, step: int, answer: Answer, lines: Sequence[bytes]) -> Answer:
        """The answer, once its trees are in the record, where steps count from 1 as on the dashboard."""
        note = self._recorder.write(step + 1, lines)
        return structs.replace(answer, notes=(*answer.notes, note)) if note else answer

    def _figures(self, step: int, trees: Sequence[Tree], groups: Sequence[Group]) -> Figures:
        now = time.monotonic()
        rollout_s = now - min(tree.born for tree in trees)
        health = self._cast.health.metrics()
        return {
            **rollout_metrics(groups, self._config.reward.metric_weights),
            **staleness_metrics(groups, step),
            "rollout/groups_replaced": Figure.of("sum", [sum(tree.replaced for tree in trees)]),
            "rollout/trees_carried_over": Figure.of("sum", [sum(tree.seat.step < step for tree in trees)]),
            "time_s/rollout": Figure.of("max", [rollout_s]),
            **self._counters.since_last(rollout_s),
            **of_kind("sum", health),
            **{name: Figure.ratio(found, of) for name, (found, of) in parts_of_shares(health).items()},
            **of_kind("max", self._cast.gateway.budget.metrics()),
            **of_kind("max", self._journal.metrics()),
            "data/prompts_left_out": Figure.of("max", [self._work.left_out]),  # every shard knows of all
            "data/prompts_left_out_share": Figure.of("max", [self._work.left_out_share]),
        }


class _Counters:
    """Clocks and counters of the clients, as they grew since the last batch."""

    def __init__(self, cast: Cast) -> None:
        self._cast = cast
        self._before = self._now()

    def since_last(self, rollout_s: float) -> Figures:
        """`rollout_s`: how long the batch's trees took; tokens per second are of the shorter of the two times."""
        before, self._before = self._before, self._now()
        clocks, calls, usage, at, replayed = self._before
        clocks_before, calls_before, usage_before, at_before, replayed_before = before
        cast, seconds = self._cast, max(min(at - at_before, rollout_s), 1e-9)
        slots = cast.engine_slots
        return {
            **of_kind("max", {name: value - clocks_before[name] for name, value in clocks.items()}),
            **of_kind("sum", (calls - calls_before).metrics()),
            **{
                name: Figure.ratio(value, over) if kind == "mean" else Figure.of(kind, [value])
                for name, (kind, value, over) in usage.since(usage_before)
                .figures(live=cast.engine.live, lost=len(cast.engine.lost), seconds=seconds)
                .items()
            },
            "engine/turns_replayed": Figure.of("sum", [replayed - replayed_before]),
            "engine/slots_tokens": Figure.of("sum", [slots.limit]),
            "engine/slots_used_tokens": Figure.of("sum", [slots.used]),
            "engine/slots_waiting": Figure.of("sum", [slots.waiting]),
        }

    def _now(self) -> tuple[Mapping[str, float], GatewaySnapshot, PoolUsage, float, int]:
        players, cast = self._cast.players, self._cast
        clocks = {
            "time_s/engine": players.engine_clock.seconds(),
            "time_s/simulators": players.user_clock.seconds(),
            "time_s/judges": players.judge_clock.seconds(),
        }
        return clocks, cast.gateway.snapshot(), cast.engine.usage.copy(), time.monotonic(), cast.recorded.replayed


def with_examples(warnings: Sequence[str], examples: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Each warning, and below it what it is about."""
    for warning in warnings:
        yield f"simulators: {warning}"
        for check, texts in examples.items():
            if f"({check}:" in warning:
                yield from (f"    {text}" for text in texts)


def _require_versions(samples: Sequence[TrainingSample], step: int, max_staleness: int) -> None:
    """Every trained token was sampled by weights of the last `max_staleness` updates, or by the newest."""
    seen = {version for sample in samples for version in sample.versions_T}
    if seen and not (step - max_staleness <= min(seen) and max(seen) <= step):
        raise RunError(
            f"driver: step {step + 1} holds tokens of weight versions {sorted(seen)}; driver.max_staleness is "
            f"{max_staleness}"
        )
