"""Trainer ranks end together and start again together; real processes with small scripts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from collab_megatron.errors import RunError
from collab_megatron.launch import trainer_ranks
from collab_megatron.launch.child_process import ChildProcess
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.launch.trainer_ranks import TrainerRanks

# the module of a rank: what CONFIG's file says, for its rank
MODULE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
exec(open(sys.argv[1]).read())
"""


class Alone:
    """The site's part that the ranks need."""

    def rank_env(self, rank: int) -> Mapping[str, str]:
        return {"RANK": str(rank)}


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainerRanks]:
    (tmp_path / "a_rank.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(trainer_ranks, "SETTLE_S", 1.0)

    def start(supervisor: Supervisor, code: str) -> TrainerRanks:
        config = tmp_path / "config"
        config.write_text(code)
        ranks = TrainerRanks(supervisor, Alone(), "a_rank", 2, {})  # type: ignore[arg-type]
        ranks.start(config, [])
        return ranks

    return start


def until(ranks: TrainerRanks, state: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not state():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_that_end_well_are_done(tmp_path: Path, begin: Callable[..., TrainerRanks]) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        ranks = begin(supervisor, "time.sleep(rank / 2)")
        assert not ranks.done
        until(ranks, lambda: ranks.poll() is not None or ranks.done)
        assert ranks.poll() is None


def test_a_killed_rank_is_the_cause_though_its_peer_fails_first(
    tmp_path: Path, begin: Callable[..., TrainerRanks]
) -> None:
    killed = "if rank: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    code = f"{killed}\nprint('error: lost its peer'); sys.exit(1)"
    with Supervisor(tmp_path / "logs") as supervisor:
        ranks = begin(supervisor, code)
        until(ranks, lambda: ranks.children[0].process.poll() is not None)
        reasons: list[str] = []
        until(ranks, lambda: reasons.append(ranks.poll() or "") or reasons[-1])  # type: ignore[func-returns-value]
        assert reasons[-1] == "trainer-1 ended with signal SIGKILL"
        ranks.end(supervisor.check, save_grace_s=60.0)  # none of them can save: no grace time
        assert ranks.children == []


@pytest.mark.slow
def test_a_rank_with_an_error_message_ends_the_run(tmp_path: Path, begin: Callable[..., TrainerRanks]) -> None:
    code = "if rank == 0: time.sleep(60)\nprint('error: the loss is not finite'); sys.exit(1)"
    said = "trainer-1 ended with exit code 1: the loss is not finite"
    with Supervisor(tmp_path / "logs") as supervisor, pytest.raises(RunError, match=said):
        ranks = begin(supervisor, code)
        until(ranks, lambda: ranks.poll())


def test_a_rank_on_a_lost_node_ends_the_run(
    tmp_path: Path, begin: Callable[..., TrainerRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        ranks = begin(supervisor, "if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
        until(ranks, lambda: ranks.children[1].process.poll() is not None)
        why = "node2 is lost (no sign of life for 20 s)"
        monkeypatch.setattr(ChildProcess, "lost", property(lambda child: why if child.name == "trainer-1" else ""))
        with pytest.raises(RunError, match="trainer-1 ended with signal SIGKILL"):
            ranks.poll()


@pytest.mark.slow
def test_a_stopped_rank_goes_on_and_all_save(tmp_path: Path, begin: Callable[..., TrainerRanks]) -> None:
    saved = tmp_path / "saved"
    code = (
        "def save(*_):\n"
        f"    open({str(saved)!r}, 'a').write(f'{{rank}}\\n'); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"open({str(tmp_path)!r} + f'/up{{rank}}', 'w')\n"
        "time.sleep(60)"
    )
    with Supervisor(tmp_path / "logs", stopped_timeout_s=0.5) as supervisor:
        ranks = begin(supervisor, code)
        until(ranks, lambda: (tmp_path / "up0").exists() and (tmp_path / "up1").exists())
        os.kill(ranks.children[1].process.pid, signal.SIGSTOP)

        def given_up() -> bool:
            supervisor.check()  # none of them is essential: it does not end the run
            return "trainer-1 was given up" in (ranks.poll() or "")

        until(ranks, given_up)
        begin_at = time.monotonic()
        ranks.end(supervisor.check, save_grace_s=60.0)
        assert time.monotonic() - begin_at < 30
    assert sorted(saved.read_text().split()) == ["0", "1"]
