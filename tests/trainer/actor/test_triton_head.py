"""The Triton head: its numbers under Triton's interpreter, its code for an H100, and when it is chosen."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from collab_megatron.trainer.actor import logprobs as head
from tests.trainer.parallel.ranks import run_script

pytest.importorskip("triton", reason="Triton is not installed (requirements/cpu.txt has it)")
ROOT = Path(__file__).resolve().parents[3]
INTERPRETED = Path(__file__).parent / "triton_head_interpreted.py"


@pytest.mark.slow
def test_the_numbers_are_those_of_torch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, INTERPRETED], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6


@pytest.mark.slow
def test_no_kernel_spills_registers_on_an_h100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    done = run_script(ROOT / "tools" / "compile_kernels.py", "--json", tmp_path / "kernels.json")
    assert done.returncode == 0, done.stderr
    with capsys.disabled():  # CI's log shows the table
        print(f"\n{done.stdout}")
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert {(row["kernel"], row["dtype"]) for row in kernels} == {
        (kernel, dtype) for kernel in ("statistics_kernel", "gradient_kernel") for dtype in ("bfloat16", "float32")
    }
    for row in kernels:
        assert row["spilled_bytes"] == 0
        assert 32 * row["warps"] * row["registers"] <= 65536 / 4, "fewer than four programs fit a multiprocessor"


@pytest.mark.parametrize("difference, chosen", [(1e-6, True), (1.0, False), (float("nan"), False), (None, False)])
def test_it_is_used_if_a_trial_agrees(
    difference: float | None, chosen: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None: the compiler raises."""

    def trial(*_: object) -> float:
        if difference is None:
            raise RuntimeError("no compiler")
        return difference

    fake = SimpleNamespace(TritonHeadLogprobs=object)
    monkeypatch.setitem(sys.modules, "collab_megatron.trainer.actor.triton_head", fake)
    monkeypatch.setattr(head.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(head, "_difference", trial)
    with caplog.at_level(logging.INFO, logger=head.logger.name):
        found = head._triton_head.__wrapped__()
    assert (found is object) == chosen
    assert [record.levelname for record in caplog.records] == ["INFO" if chosen else "WARNING"]
