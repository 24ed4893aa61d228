"""The last save: whatever ends a run between two updates saves the state first; a half-done update is never saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from collab_megatron.config.sections import RunSection, TrainSection
from collab_megatron.errors import EXIT_INTERRUPTED, Interrupted, RunError
from collab_megatron.trainer.interrupt import Interrupt
from collab_megatron.trainer.saving import Saving, no_record
from tests.trainer.parallel.ranks import run_ranks

RANKS = Path(__file__).with_name("saving_ranks.py")


class Saves:
    """The checkpoints of a run, by their steps."""

    def __init__(self, saved: int = 0, *, broken: bool = False, asynchronous: bool = False) -> None:
        self.saved, self.tries, self._broken = saved, list[int](), broken
        self._asynchronous, self._running = asynchronous, 0

    def save(self, step: int, *, best_loss: float | None = None) -> None:
        self.wait()
        self.tries.append(step)
        self._running = step
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        running, self._running = self._running, 0
        if running and self._broken:
            raise RunError("disk full")
        self.saved = running or self.saved


def saving_of(
    saves: Saves,
    now: list[float] | None = None,
    asked: Any = None,
    record: Callable[[], None] = no_record,
    **train: float,
) -> Saving:
    grid = cast(Any, SimpleNamespace(rank=0, world_size=1, is_main=True, timeout_s=5.0))
    clock = [0.0] if now is None else now
    interrupt = cast(Any, asked or SimpleNamespace(asked=False, install=lambda: None))
    section = TrainSection.model_validate({"steps": 100, **train})
    return Saving(saves, grid, RunSection(dir=Path("run")), section, interrupt, record, clock=lambda: clock[0])


def take(saving: Saving, steps: int) -> None:
    for _ in range(steps):
        with saving.step():
            pass
        if saving.due():
            saving.save()


@pytest.mark.parametrize("failure", [RunError("the API is away"), ValueError("a bug"), TimeoutError()])
def test_a_whole_state_is_saved_whatever_ends_the_run(failure: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    saves = Saves(saved=4)
    saving = saving_of(saves)
    with pytest.raises(type(failure)), saving.before_any_end():
        take(saving, 3)
        raise failure
    assert saves.tries == [7]
    assert "step 7 is saved: run/checkpoints/run/step_00000007; run.resume=true continues" in capsys.readouterr().out


def test_half_a_step_is_not_saved(capsys: pytest.CaptureFixture[str]) -> None:
    saves = Saves()
    saving = saving_of(saves, save_interval=2)
    with pytest.raises(RunError, match="a peer died"), saving.before_any_end():
        take(saving, 3)
        with saving.step():
            raise RunError("a peer died")
    assert saves.tries == [2]
    assert "step 2 is saved (training was at step 3): " in capsys.readouterr().out


def test_nothing_is_saved_twice_nor_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    for saves, steps, expected in ((Saves(), 0, []), (Saves(saved=4), 0, []), (Saves(), 2, [2])):
        saving = saving_of(saves, save_interval=2)
        with pytest.raises(RunError), saving.before_any_end():
            take(saving, steps)
            raise RunError("away")
        assert saves.tries == expected
    assert "this run has no complete checkpoint" in capsys.readouterr().out


def test_a_save_that_fails_is_not_tried_again_and_hides_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    saves = Saves(broken=True)
    saving = saving_of(saves, save_interval=2)
    with pytest.raises(RunError, match="disk full"), saving.before_any_end():
        take(saving, 2)
    assert saves.tries == [2]
    saving = saving_of(saves)
    with pytest.raises(RunError, match="the API is away"), saving.before_any_end():
        take(saving, 1)
        raise RunError("the API is away")
    assert "the state after step 1 could not be saved: disk full" in caplog.text


@pytest.mark.parametrize("noticed", ["at the next save", "at the end"])
def test_a_state_is_saved_though_the_asynchronous_save_before_it_failed(
    noticed: str, caplog: pytest.LogCaptureFixture
) -> None:
    saves = Saves(broken=True, asynchronous=True)
    saving = saving_of(saves, save_interval=2)
    with pytest.raises(RunError, match=r"disk full|away"), saving.before_any_end():
        take(saving, 3)
        saves.tries.clear()
        if noticed == "at the end":
            raise RunError("the API is away")
        take(saving, 1)
    assert saves.tries == [saving.done]
    assert f"the state after step {saving.done} could not be saved" in caplog.text
    saves = Saves(asynchronous=True)
    saving = saving_of(saves, save_interval=2)
    with pytest.raises(RunError, match="away"), saving.before_any_end():
        take(saving, 3)
        raise RunError("the API is away")
    assert (saves.tries, saves.saved) == ([2, 3], 3)


def test_no_checkpoint_outlives_its_figures(caplog: pytest.LogCaptureFixture) -> None:
    done, saves = list[str](), Saves()
    saving = saving_of(saves, record=lambda: done.append(f"figures, {len(saves.tries)} saves"), save_interval=2)
    with pytest.raises(RunError, match="away"), saving.before_any_end():
        take(saving, 3)
        raise RunError("the API is away")
    assert done == ["figures, 0 saves", "figures, 1 saves"]
    assert saves.tries == [2, 3]

    def refuse() -> None:
        raise RunError("cannot write the dashboard")

    saves = Saves()
    saving = saving_of(saves, record=refuse, save_interval=1)
    take(saving, 1)
    assert saves.tries == [1]  # the weights are worth more, and the other ranks have begun the save
    assert "the figures up to step 1 may be lost: cannot write the dashboard" in caplog.text


def test_an_interrupt_in_the_last_step_promises_that_a_resume_finishes(capsys: pytest.CaptureFixture[str]) -> None:
    saves, asked = Saves(), SimpleNamespace(asked=False, install=lambda: None)
    saving = saving_of(saves, asked=asked, steps=2)
    with pytest.raises(Interrupted), saving.before_any_end():
        take(saving, 1)
        asked.asked = True
        take(saving, 1)
    assert saves.tries == [2]
    assert "step_00000002; run.resume=true finishes what comes after it" in capsys.readouterr().out
    with pytest.raises(Interrupted):
        saving.go_on()
    asked.asked = False
    saving.go_on()


def test_the_clock_saves_too() -> None:
    now, saves = [0.0], Saves()
    saving = saving_of(saves, now, save_every_s=100)
    for time_s in (50.0, 99.0, 101.0, 150.0, 200.0, 202.0):
        now[0] = time_s
        take(saving, 1)
    assert saves.tries == [3, 6]
    off = Saves()
    now[0] = 0.0
    saving = saving_of(off, now, save_every_s=0)
    now[0] = 1e9
    take(saving, 1)
    assert off.tries == []


def test_an_interrupted_run_saves_after_its_step() -> None:
    saves, asked = Saves(), SimpleNamespace(asked=False, install=lambda: None)
    saving = saving_of(saves, asked=asked)
    with pytest.raises(Interrupted), saving.before_any_end():
        take(saving, 2)
        asked.asked = True
        take(saving, 2)
    assert saves.tries == [3]


GRACE_S = 1e6
"""At its end the process ends, which here is pytest itself."""


def test_a_signal_ends_a_wait_and_is_kept_where_nothing_waits() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupt = Interrupt(GRACE_S)
        interrupt.install()
        began = time.monotonic()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Interrupted), interrupt.waiting():
            time.sleep(20)
        assert time.monotonic() - began < 10
        later = Interrupt(GRACE_S)
        later.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert later.asked
        with pytest.raises(Interrupted), later.waiting():
            pytest.fail("waits in spite of the signal")
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


SAVES_AT_TERM = """
import signal, sys, time
from collab_megatron.trainer import interrupt
later = float(sys.argv[1])
asked = interrupt.Interrupt(300.0, clock=lambda: time.monotonic() + (later if asked.asked else 0.0))
asked.install()
signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGTERM)
print("saves")
"""


@pytest.mark.parametrize(("later_s", "code"), [(0.0, 0), (60.0, -signal.SIGTERM)])
def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_ends_the_process(later_s: float, code: int) -> None:
    argv = [sys.executable, "-c", SAVES_AT_TERM, str(later_s)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "" if code else "saves\n"), done.stderr


NEVER_SAVES = """
import signal, sys, time
from collab_megatron.trainer import interrupt
interrupt_ = interrupt.Interrupt(0.2)
interrupt_.install()
signal.raise_signal(int(sys.argv[1]))
print("saves", flush=True)
time.sleep(100)
print("saved")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_grace_time_ends_a_save_that_does_not(number: int) -> None:
    argv = [sys.executable, "-c", NEVER_SAVES, str(int(number))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (EXIT_INTERRUPTED, "saves\n"), done.stderr
    assert "the process did not end within 0.2 s, and nothing more is saved; raise train.save_grace_s" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "main", "other"),
    [
        ("alike", "the API is away saved 1 at once", "the API is away saved 1 at once"),
        ("alone", "the other rank is gone, saved 0", "the API is away saved 0 at once"),
        ("clock", "saved 2", "saved 2"),
        ("interrupted", "interrupted saved 1", "interrupted saved 1"),
    ],
)
def test_on_two_ranks(case: str, main: str, other: str) -> None:
    said = run_ranks(RANKS, 2, case, deadline_s=100)
    assert [main in said[0], other in said[1]] == [True, True], said
