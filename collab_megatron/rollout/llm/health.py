"""Simulator health: shares of odd replies by check, with limits above which the run warns or stops.

    health = SimulatorHealth(config.simulators.health)  # sees turns and replies; one per process
    counts = health.metrics()                           # since the last call; sums over processes
    warnings, stop = verdict(counts, config.simulators.health)

Counts are plain sums, so those of several processes are added up before shares() turns them into shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from collab_megatron.config.sections import HealthSection
from collab_megatron.errors import UserError
from collab_megatron.figures import Figure, Figures, values
from collab_megatron.rollout.llm.accounting import MALFORMED
from collab_megatron.rollout.llm.turn_checks import DETECTORS, Turn
from collab_megatron.types import TERMINATION_SIGNAL, Message, Task

EXAMPLES = 3  # texts kept per check
EXAMPLE_CHARS = 200


@dataclass(frozen=True)
class Check:
    """One way in which a reply can be odd."""

    meaning: str  # for the warning: "12 % of the turns ..."
    per: str  # denominator of its share: turns (of the user simulator) | replies (all, malformed ones included)
    warn: float | None = None  # highest share without a warning; None: only counted


CHECKS: Mapping[str, Check] = {
    "role_swapped": Check("talk like the assistant", "turns", 0.05),
    "goal_copied": Check("copy the hidden request", "turns", 0.05),
    "restarted": Check("start the chat over", "turns", 0.05),
    "scratchpad_leaked": Check("show the simulator's thoughts", "turns", 0.01),
    "early_end": Check("end the chat before the assistant has done anything", "turns", 0.05),
    "bare_end": Check("only end the chat", "turns"),
    "empty": Check("are empty", "replies", 0.05),
    "unreadable": Check("contain no readable JSON", "replies", 0.05),
    "wrong_role": Check("have a role other than assistant in the API's answer", "replies", 0.05),
    "too_long": Check("are far longer than max_tokens", "replies", 0.05),
    "model_changed": Check("come from another model than the run's first", "replies", 0.0),
    # providers serve one model from several builds at the same time
    "fingerprint_changed": Check("come from another build of the model than the run's first", "replies", 0.5),
}


class SimulatorHealth:
    """The counts of one process. Implements role_client.Observer. Raises UserError for a limit on an unknown check."""

    def __init__(self, section: HealthSection) -> None:
        check_limits(section)
        self._section = section
        self._counts: Counter[str] = Counter()
        self._roles: dict[str, set[str]] = {}  # role -> denominators (Check.per) of its checks
        self._first: dict[tuple[str, int, str], str] = {}  # (role, deployment, check) -> first model or fingerprint
        self._examples: dict[str, list[str]] = {}

    def observe_turn(
        self, role: str, task: Task, chat: Sequence[Message], text: str, *, signal: str = TERMINATION_SIGNAL
    ) -> None:
        """Check an accepted user turn. `chat` ends before it; `text` may contain the termination `signal`."""
        self._count(role, "turns", "turns")
        turn = Turn.of(task, chat, text, signal)
        for name, detect in DETECTORS.items():
            if detect(turn):
                self._count(role, name, CHECKS[name].per)
                self._keep(name, text)

    def malformed(self, role: str, kind: str) -> None:
        """A reply could not be used; `kind` is one of MALFORMED. Raises ValueError for another kind."""
        if kind not in MALFORMED:
            raise ValueError(f"unknown kind of malformed reply {kind!r}; known are {', '.join(MALFORMED)}")
        self._count(role, kind, "replies")

    def provider(self, role: str, model: str, fingerprint: str, deployment: int = 0) -> None:
        """A reply came, malformed or not. Model and build are those that the provider reports, or empty.

        Each deployment is compared with its own first reply: deployments may name the same model differently.
        """
        self._count(role, "replies", "replies")
        for name, now in (("model_changed", model), ("fingerprint_changed", fingerprint)):
            if now and now != (first := self._first.setdefault((role, deployment, name), now)):
                self._count(role, name, "replies")
                self._keep(name, f"{role}: {now} instead of {first}")

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, as health/ROLE/CHECK, for every role seen so far."""
        counts = self._metrics()
        self._counts.clear()
        return counts

    def verdict(self) -> tuple[list[str], str | None]:
        """verdict() of the counts since the last metrics()."""
        return verdict(self._metrics(), self._section)

    def examples(self) -> dict[str, tuple[str, ...]]:
        """Up to 3 texts per check since the last call, each on one line of at most 200 characters."""
        examples = {name: tuple(texts) for name, texts in self._examples.items()}
        self._examples.clear()
        return examples

    def _count(self, role: str, what: str, per: str) -> None:
        self._counts[f"health/{role}/{what}"] += 1
        self._roles.setdefault(role, set()).add(per)

    def _metrics(self) -> dict[str, float]:
        names = [
            f"health/{role}/{name}"
            for role, kinds in self._roles.items()
            for name in [*sorted(kinds), *(name for name, check in CHECKS.items() if check.per in kinds)]
        ]
        return {name: float(self._counts[name]) for name in names}

    def _keep(self, name: str, text: str) -> None:
        kept = self._examples.setdefault(name, [])
        if len(kept) < EXAMPLES:
            kept.append(_one_line(text))


def check_limits(section: HealthSection) -> None:
    """Raises UserError for a limit on a check that does not exist."""
    for field, limits in (("warn", section.warn), ("stop", section.stop)):
        unknown = sorted(set(limits) - set(CHECKS))
        if unknown:
            raise UserError(
                f"simulators.health.{field}: there is no check {unknown[0]!r}; known are {', '.join(CHECKS)}"
            )


def share_figures(counts: Mapping[str, float]) -> Figures:
    """health/CHECK_share over all roles, of counts as metrics() names them.

    A check without any turns or replies is left out.
    """
    result: Figures = {}
    for name, check in CHECKS.items():
        found, of = _found(counts, name), _found(counts, check.per)
        if of:
            result[f"health/{name}_share"] = Figure.ratio(sum(found.values()), sum(of.values()))
    return result


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """health/CHECK_share over all roles."""
    return values(share_figures(counts))


def verdict(counts: Mapping[str, float], section: HealthSection) -> tuple[list[str], str | None]:
    """(warnings, a sentence that stops the run or None) for a step's counts. Raises UserError for an unknown check.

    Limits take effect from `min_replies` turns or replies on.
    """
    check_limits(section)
    warnings, stop = [], None
    share_of = shares(counts)
    for name in CHECKS:
        share = share_of.get(f"health/{name}_share", 0.0)
        if sum(_found(counts, CHECKS[name].per).values()) < section.min_replies:
            continue
        limit = section.stop.get(name)
        if limit is not None and share > limit:
            stop = stop or (
                f"{_in_words(counts, name)}, more than simulators.health.stop.{name}={limit:g} allows: fix the "
                "simulator's prompt or model, or raise the limit, and resume"
            )
        limit = section.warn.get(name, CHECKS[name].warn)
        if limit is not None and share > limit:
            warnings.append(f"{_in_words(counts, name)} (simulators.health.warn.{name}={limit:g})")
    return warnings, stop


def _in_words(counts: Mapping[str, float], name: str) -> str:
    check = CHECKS[name]
    found, of = _found(counts, name), _found(counts, check.per)
    by_role = ", ".join(f"{role} {count:.0f} of {of.get(role, 0):.0f}" for role, count in found.items() if count)
    share = sum(found.values()) / max(sum(of.values()), 1.0)
    return f"{share:.1%} of the {check.per} {check.meaning} ({name}: {by_role})"


def _found(counts: Mapping[str, float], what: str) -> dict[str, float]:
    """role -> count of one check, or of turns or replies."""
    found = {}
    for key, count in counts.items():
        prefix, _, rest = key.partition("/")
        role, _, last = rest.rpartition("/")
        if prefix == "health" and role and last == what:
            found[role] = count
    return found


def _one_line(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * EXAMPLE_CHARS]).split())
    return line if len(line) <= EXAMPLE_CHARS else line[: EXAMPLE_CHARS - 1] + "…"
