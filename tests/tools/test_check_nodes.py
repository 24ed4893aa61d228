"""tools/check_nodes.py: what it says of nodes that differ; the whole of it runs in tests/slurm."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from collab_megatron.errors import UserError
from collab_megatron.wire.job import Hello
from tools import check_nodes
from tools.check_nodes import Finding, problems

FOLDER = Path("runs/slurm")


def finding(node: str, *, shared: bool = True, output: str = "torch 2, 8 GPUs", error: str = "") -> Finding:
    return Finding(node, Hello(node, "10.0.0.1", 64, (), "0.3", "boot"), shared, output, error)


def test_nodes_that_are_alike_have_no_problem() -> None:
    assert problems([finding("a"), finding("b")], FOLDER) == []
    words = " ".join(finding("a").line.split())
    assert words == "a 10.0.0.1 64 cores torch 2, 8 GPUs, version 0.3 sees the folder"


def test_every_problem_names_its_nodes() -> None:
    blind, failed, other = finding("a", shared=False), finding("b", output="", error="lost"), finding("c")
    assert problems([blind, failed, other], FOLDER) == [
        "b: lost",
        "a: runs/slurm is not visible: choose a folder that all nodes share (--folder)",
    ]
    (differ,) = problems([other, finding("d", output="torch 2, 7 GPUs")], FOLDER)
    assert differ.startswith("the nodes differ in packages or GPUs")


def test_outside_a_job_and_without_a_key_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_nodes, "end_at_signals", lambda: None)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.setattr("sys.argv", ["check_nodes.py", "--address", "127.0.0.1:*"])
    with pytest.raises(UserError, match=r"there is no Slurm job here: use sbatch slurm/check_nodes\.sbatch"):
        check_nodes.main()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    monkeypatch.setattr("sys.stdin", io.StringIO("short"))
    with pytest.raises(UserError, match="standard input has no key of 64 hexadecimal digits"):
        check_nodes.main()
