"""Programs without isolation: refused by default; the limits hold, and nothing of them goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from collab_megatron.errors import UserError
from collab_megatron.rollout.sandbox import sandbox as module
from collab_megatron.rollout.sandbox.launcher import SETUP
from collab_megatron.rollout.sandbox.sandbox import Sandbox
from tests.rollout.sandbox.programs import HURRIED, LIMITS, processes_of, run


def test_without_isolation_it_refuses_to_start_unless_unsafe_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ["/bin/sh", "-c", f"echo the kernel said no >&2; exit {SETUP}"]
    monkeypatch.setattr(module, "_launch", lambda *arguments: refused)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    module.isolation.cache_clear()
    with pytest.raises(UserError, match=r"isolated: the kernel said no; .*no bwrap.*set here\.sandbox=unsafe"):
        Sandbox(LIMITS, setting="here.sandbox")
    assert Sandbox(LIMITS, unsafe=True).mode == "unsafe"
    module.isolation.cache_clear()
    with pytest.raises(UserError, match="not a Python interpreter"):
        Sandbox(LIMITS, python=Path("/bin/false"))


@pytest.mark.slow
def test_unsafe_keeps_the_limits(mark: str) -> None:
    unsafe = Sandbox(LIMITS, unsafe=True)
    code = (
        "import os; open('x', 'w'); print(os.getcwd(), sorted(os.environ)[:2], os.path.expanduser('~') == os.getcwd())"
    )
    ran = run(unsafe, code, mark=mark)
    folder, _, rest = ran.result.decode().partition(" ")
    assert rest.endswith("True\n")
    assert not Path(folder).exists()
    assert "OPENAI" not in rest
    loop = "import os, time; os.fork() or os.setsid(); time.sleep(60)"  # the fork is none of its parent's session
    assert run(Sandbox(HURRIED, unsafe=True), loop, mark=mark).ended == "timeout"
    assert "MemoryError" in run(unsafe, "x = bytearray(1 << 30)", mark=mark).output
    assert run(unsafe, "while True: print('x' * 65536)", mark=mark).ended == "output"


def test_unsafe_ends_forks_of_a_program_that_writes_too_much(mark: str) -> None:
    """The launcher is not simply killed then: the fork has a session of its own, and would go on."""
    code = """
import os, time
if not os.fork():
    os.setsid()
    time.sleep(60)
while True:
    print("x" * 65536)
"""
    assert run(Sandbox(LIMITS, unsafe=True), code, mark=mark).ended == "output"
    assert not processes_of(mark)
