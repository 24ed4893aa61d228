"""The watch command with a real live page in a process of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from collab_megatron import watch
from collab_megatron.errors import UserError
from tests.conftest import REPOSITORY
from tests.rollout.test_live_page import STATUS

WAIT_S = 20.0


@pytest.fixture
def page(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Of the run `rl` in tmp_path / "run"."""
    latest = tmp_path / "run" / "logs" / "rl" / "attempt-1"
    latest.mkdir(parents=True)
    (latest.parent / "latest").symlink_to(latest.name)
    process = subprocess.Popen([sys.executable, "-m", "tests.rollout.lone_page", str(latest), "30"], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + WAIT_S
        while not (latest / "live.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)


def test_once(page: subprocess.Popen[bytes], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "collab_megatron.watch", str(tmp_path / "run"), "--once"]
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(argv, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == "rl: step 12 of 40"
    for shown in (
        "phase                 rollouts of step 12, for 1m15s",
        "calls in flight       5 user",
        "left                  4m12s",
        "so far                4,321 LLM calls, $1.50",
        "reward                1.75",
        "http://127.0.0.1:1: it does not answer",
        "  assistant: which day?",
    ):
        assert shown in lines
    assert "\x1b" not in done.stdout


def watched(page: subprocess.Popen[bytes], run: Path, console: Console, shown: Callable[[], bool]) -> None:
    """Watch until the page ends, which it does once `shown`."""

    def end() -> None:
        deadline = time.monotonic() + WAIT_S
        while not shown() and time.monotonic() < deadline:
            time.sleep(0.05)
        page.kill()

    ending = threading.Thread(target=end)
    ending.start()
    watch.watch(watch.logs_of(run, None), console)
    ending.join()


@pytest.mark.slow
def test_it_ends_with_the_run_and_has_a_line_for_each_step(
    page: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "ASK_S", 0.05)
    monkeypatch.setattr(watch, "GONE_S", 1.0)
    said, since = io.StringIO(), time.monotonic()
    watched(page, tmp_path / "run", Console(file=said, width=80), lambda: time.monotonic() > since + 1.0)
    assert said.getvalue().splitlines() == [
        "rl: step 12 of 40 | reward 1.75 | so far 4,321 LLM calls, $1.50 | 4m12s left",
        "no answer for 1 s: the run has ended",
    ]
    with pytest.raises(UserError, match="does not answer: the run has ended"):
        watch.watch(watch.logs_of(tmp_path / "run", "rl"), Console(file=said))


@pytest.mark.slow
def test_a_terminal_is_drawn_again_at_each_answer(
    page: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "ASK_S", 0.2)
    monkeypatch.setattr(watch, "GONE_S", 0.5)
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=80, color_system="standard")
    watched(page, tmp_path / "run", console, lambda: said.getvalue().count("rollouts of step 12") > 2)
    assert said.getvalue().count("rollouts of step 12") > 2
    assert "\x1b[2K" in said.getvalue()  # the lines of the picture before are erased


def test_what_a_model_wrote_cannot_write_to_the_terminal() -> None:
    evil = replace(
        STATUS,
        run="[bold]rl[/bold]",
        chat=(("user", "\x1b[2J\x1b]0;title\x07 \u202eabc [red]x[/red] \ud800"), ("assistant", "a\nb")),
        engines_lost={"http://x": "\x9b31m"},
    )
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, record=True)
    console.print(watch.picture([evil, STATUS]))
    console.print(watch.line(evil))
    shown = console.export_text()
    assert not any(char in shown for char in "\x1b\x07\x9b\u202e\ud800")
    assert "[bold]rl[/bold]: step 12 of 40" in shown
    assert r"\x1b[2J\x1b]0;title\x07 \u202eabc [red]x[/red] \ud800" in shown
    assert "process 1" in shown


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"logs/NAME/latest/live\.json is missing"):
        watch.logs_of(tmp_path, None)
    for name in ("a", "b"):
        folder = tmp_path / "logs" / name / "latest"
        folder.mkdir(parents=True)
        (folder / "live.json").write_text("{}")
        os.utime(folder / "live.json", (0, 1) if name == "b" else (0, 9))
    assert watch.logs_of(tmp_path, None) == tmp_path / "logs" / "a" / "latest"
    assert "has the runs a, b: this is a" in capsys.readouterr().out
    assert watch.logs_of(tmp_path, "b") == tmp_path / "logs" / "b" / "latest"
    with pytest.raises(UserError, match="no run has a live page"):
        watch.logs_of(tmp_path, "c")
