"""Limits of restarts in a row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import RunError
from collab_megatron.launch import restarts, run_processes
from collab_megatron.launch.restarts import STEADY_S, Restarts
from tests.conftest import REPOSITORY


def test_one_that_lived_long_enough_begins_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(restarts.time, "monotonic", lambda: clock[0])
    count = Restarts(limit=2)
    for lived_s, allowed in ((1, True), (STEADY_S - 1, True), (STEADY_S, True), (1, True), (1, False)):
        count.begin()
        clock[0] += lived_s
        assert count.take() is allowed
    assert count.count == 2


def test_none_are_allowed_with_a_limit_of_zero() -> None:
    assert not Restarts(limit=0).take(recovered=True)


class Ranks:
    """Fails at each poll; `stories` says which checkpoint is the newest at each failure."""

    done = False

    def poll(self) -> str:
        return "trainer-1 ended with signal SIGKILL"

    def end(self, tick: Callable[[], None], *, save_grace_s: float) -> None: ...


class Publisher:
    def publish(self, name: str, text: str) -> Path:
        return Path(name)


@pytest.mark.parametrize(
    "newest, starts",
    [
        # pairs: the newest checkpoint when a rank fails, and after the others were ended
        ([0, 0, 0, 0, 0, 0, 0], ["again-1.yaml", "again-2.yaml", "again-3.yaml"]),
        ([20, 20, 40, 40, 60, 60, 60, 60, 60, 60, 60], [f"again-{number}.yaml" for number in range(1, 6)]),
        ([0, 1, 1, 2, 2, 3, 3], ["again-1.yaml", "again-2.yaml", "again-3.yaml"]),  # hung ranks that save when ended
    ],
)
def test_the_trainers_count_starts_over_at_a_checkpoint_of_its_own(
    newest: list[int], starts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", ["train.max_restarts=3"])
    steps = iter(newest)
    monkeypatch.setattr(run_processes, "newest_step", lambda run: next(steps))
    monkeypatch.setattr(run_processes, "POLL_S", 0.0)
    started: list[str] = []
    with pytest.raises(RunError, match=r"SIGKILL, after 3 restarts of the trainer \(train.max_restarts=3\)"):
        run_processes.watch(
            config,
            Publisher(),  # type: ignore[arg-type]
            Ranks(),  # type: ignore[arg-type]
            lambda: None,
            lambda resolved, life: started.append(resolved.name),
        )
    assert started == starts
    assert list(steps) == []
