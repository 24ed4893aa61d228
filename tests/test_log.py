"""Who wrote a line stands in it; the launcher and rank 0 speak on the terminal, the others into their files."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.log import QUIET, set_up_logging

KEY = "sk-0123456789"
PROCESS = f"""
import logging, sys
from collab_megatron.log import set_up_logging
set_up_logging(sys.argv[1])
logging.getLogger("collab_megatron.trainer.actor.backend").info("backend cpu")
logging.getLogger("httpx").info("GET http://host/v1?key={KEY}")
"""


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What `set_up_logging("trainer-3", written)` writes; the root logger is left as it was found."""
    root, package = logging.getLogger(), logging.getLogger("collab_megatron")
    before = list(root.handlers), root.level, package.level, {name: logging.getLogger(name).level for name in QUIET}
    stream = io.StringIO()
    set_up_logging("launcher", io.StringIO())
    set_up_logging("trainer-3", stream)
    yield stream
    root.handlers[:], levels = before[0], before[3]
    root.setLevel(before[1])
    package.setLevel(before[2])
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_line_names_who_wrote_it_and_third_parties_stay_quiet(written: io.StringIO) -> None:
    ours = logging.getLogger("collab_megatron.trainer.actor.backend")
    ours.info("backend %s", "cpu")
    ours.warning("near the limit")
    ours.debug("a detail")
    logging.getLogger("some.package").info("hello")
    logging.getLogger("some.package").warning("disk is slow")
    for name in ("megatron.core.optimizer", "transformers.modeling", "LiteLLM", "httpx._client"):
        logging.getLogger(name).info("GET http://host/v1?key=%s", KEY)
    logging.getLogger("megatron.core.x").warning("noise")
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in written.getvalue().splitlines()]
    assert lines == [
        "trainer-3 trainer.actor.backend: backend cpu",
        "trainer-3 trainer.actor.backend: warning: near the limit",
        "trainer-3 some.package: warning: disk is slow",
    ]


def test_a_child_speaks_into_its_log_and_the_shown_one_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Supervisor(tmp_path) as supervisor:
        for rank in (0, 1):
            argv = [sys.executable, "-c", PROCESS, f"trainer-{rank}"]
            supervisor.start(f"trainer-{rank}", argv, {}, show=rank == 0)
        supervisor.wait_for(supervisor._children, timeout_s=60)
    told = (tmp_path / "trainer-1.log").read_text()
    assert told.endswith(" trainer-1 trainer.actor.backend: backend cpu\n")
    shown = capfd.readouterr().err
    assert shown.endswith(" trainer-0 trainer.actor.backend: backend cpu\n")
    assert KEY not in told + shown


@pytest.mark.parametrize("entry", ["train_rl", "train_sft", "train_dpo", "evaluate"])
@pytest.mark.slow
def test_every_entry_point_sets_it_up(entry: str, tmp_path: Path) -> None:
    """The first thing that `main` does after reading its arguments; a config that is missing ends it there."""
    code = (
        "import logging, runpy, sys\n"
        "import collab_megatron.log as log\n"
        "kept = log.set_up_logging\n"
        "def spied(who):\n    print('set up for', who)\n    kept(who)\n"
        "log.set_up_logging = spied\n"
        f"sys.argv = ['x', {str(tmp_path / 'none.yaml')!r}]\n"
        f"runpy.run_module('collab_megatron.{entry}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "set up for " in done.stdout
