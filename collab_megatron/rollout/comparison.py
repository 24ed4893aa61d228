"""The table of an evaluation: models and users as rows; task metrics, tokens, interactivity as in the paper's tables.

A row's figures are means over its scored conversations, with bootstrap intervals; `difference` is the mean of model
minus baseline over the tasks that both have, with the same user. A conversation that failed is in neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.config.sections import ComparisonSection
from collab_megatron.rollout.bootstrap import Interval, bootstrap_mean
from collab_megatron.rollout.evaluation import Evaluation
from collab_megatron.rollout.evaluation_tasks import is_opening
from collab_megatron.rollout.rewards import asks_question
from collab_megatron.types import Group, Message

TOKENS_K = "tokens_k"
RATES = ("asks_if_unclear", "asks_if_clear")
OWN_USER = "simulators.user"
"""Name of the config's own user in the table."""


@dataclass(frozen=True)
class Cell:
    """One model with one user: its conversations and what they cost in this attempt."""

    model: str
    user: str  # OWN_USER, or a name of evaluation.users
    groups: Sequence[Group]  # one conversation each
    cost_usd: float = 0.0  # of user, judges and API model; replies from the journal are free
    calls: int = 0  # LLM requests that were sent
    replayed: int = 0  # answers from the journal
    wins: Wins | None = None  # against the baseline

    @property
    def scored(self) -> dict[str, Group]:
        """Task id -> conversation with a reward."""
        return {group.task.task_id: group for group in self.groups if group.kept}


def cells_of(model: str, played: Evaluation) -> list[Cell]:
    """A model's cells, one for each user."""
    found = []
    for user, groups in played.by_user.items():
        calls = [call for group in groups for reply in group.replies_G for f in reply.futures_K for call in f.calls]
        found.append(
            Cell(
                model,
                user or OWN_USER,
                groups,
                cost_usd=sum(call.cost_usd for call in calls),
                calls=sum(call.requests for call in calls),
                replayed=sum(call.replayed for call in calls),
            )
        )
    return found


@dataclass(frozen=True)
class Wins:
    """What a judge said of a model's conversations against the baseline's."""

    points: Mapping[str, float] = field(default_factory=dict)  # task id -> 1 won, 0.5 tie, 0 lost
    failed: int = 0  # pairs without a verdict
    cost_usd: float = 0.0

    def counts(self) -> dict[str, int]:
        values = list(self.points.values())
        return {
            "won": sum(value == 1.0 for value in values),
            "tied": sum(value == 0.5 for value in values),
            "lost": sum(value == 0.0 for value in values),
            "failed": self.failed,
        }


def columns(weights: Mapping[str, float]) -> list[str]:
    """Figures of a row: task metrics first, then tokens in thousands, interactivity, reward, rates of questions."""
    metrics = [name for name in weights if name not in ("token_amount", "interactivity")]
    return [*metrics, TOKENS_K, *(["interactivity"] if "interactivity" in weights else []), "mr", *RATES]


def values_of(group: Group) -> dict[str, float]:
    """The figures of one scored conversation; a figure that it does not have is left out."""
    (reply,) = group.replies_G
    (future,) = reply.futures_K
    values = {**future.scores, TOKENS_K: future.policy_tokens / 1000}
    if reply.mr is not None:
        values["mr"] = reply.mr
    if is_opening(group.task) and group.task.ambiguous is not None:
        values[RATES[0] if group.task.ambiguous else RATES[1]] = float(asks_question(reply.text))
    return values


def messages_of(group: Group) -> list[Message]:
    """The whole conversation without system messages."""
    (reply,) = group.replies_G
    chat = [*group.task.prompt, Message("assistant", reply.text), *reply.futures_K[0].messages]
    return [message for message in chat if message.role != "system"]


def table(
    cells: Sequence[Cell], weights: Mapping[str, float], section: ComparisonSection, *, baseline: str, seed: int
) -> dict[str, Any]:
    """The table as plain JSON values. `baseline` names a model; a row of it has no difference."""
    bases = {cell.user: cell for cell in cells if cell.model == baseline}
    names = columns(weights)
    rows = []
    for cell in cells:
        base = bases.get(cell.user)
        against = base if base is not None and cell.model != baseline else None
        rows.append(_row(cell, against, names, section, seed))
    return {
        "baseline": baseline,
        "confidence": section.confidence,
        "resamples": section.resamples,
        "columns": [name for name in names if any(name in row["figures"] for row in rows)],
        "rows": rows,
    }


def _row(cell: Cell, base: Cell | None, names: Sequence[str], section: ComparisonSection, seed: int) -> dict[str, Any]:
    mine = {task_id: (group, values_of(group)) for task_id, group in sorted(cell.scored.items())}
    theirs = {} if base is None else {task_id: values_of(group) for task_id, group in base.scored.items()}

    def interval(values: Mapping[str, float]) -> dict[str, Any] | None:
        found = _interval(values, mine, section, seed)
        return None if found is None else found.as_dict()

    figures: dict[str, dict[str, Any] | None] = {}
    difference: dict[str, dict[str, Any] | None] = {}
    for name in names:
        own = {task_id: values[name] for task_id, (_, values) in mine.items() if name in values}
        figures[name] = interval(own)
        difference[name] = interval(
            {
                task_id: value - theirs[task_id][name]
                for task_id, value in own.items()
                if name in theirs.get(task_id, {})
            }
        )
    won = None
    if cell.wins is not None:
        rate = interval(dict(sorted(cell.wins.points.items())))
        won = {"rate": rate, **cell.wins.counts(), "cost_usd": cell.wins.cost_usd}
    return {
        "model": cell.model,
        "user": cell.user,
        "conversations": len(cell.groups),
        "failed": len(cell.groups) - len(mine),
        "figures": {name: value for name, value in figures.items() if value is not None},
        "difference": {name: value for name, value in difference.items() if value is not None},
        "wins": won,
        "cost_usd": cell.cost_usd,
        "calls": cell.calls,
        "replayed": cell.replayed,
    }


def _interval(
    values: Mapping[str, float], mine: Mapping[str, tuple[Group, Any]], section: ComparisonSection, seed: int
) -> Interval | None:
    """Over tasks; the tasks of one request are drawn together."""
    return bootstrap_mean(
        list(values.values()),
        [mine[task_id][0].task.single_turn_prompt for task_id in values],
        confidence=section.confidence,
        resamples=section.resamples,
        seed=seed,
    )
