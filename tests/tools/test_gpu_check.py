"""tools/gpu_check.py with made-up parts, and with two of its own on the CPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collab_megatron.errors import RunError
from tests.conftest import REPOSITORY, Ended, Run
from tools import gpu_check
from tools.bench import weight_sync
from tools.gpu import results
from tools.gpu.parts import Part, parts
from tools.gpu.results import Reading
from tools.gpu.rl_steps import STEPS, figures
from tools.gpu_check import END_S, LIMIT_S, SHORTEST_S, check, line, room_s

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('7')"


def read_number(path: Path) -> Reading:
    return Reading(f"found {int(path.read_text())}", {"number": 7})


def part(name: str, code: str, deadline_s: float = 30.0, gpus: int = 1, least_s: float = 1.0) -> Part:
    """A part that runs `code`; sys.argv[1] is the file of its results."""
    return Part(name, lambda out: ["-c", code, str(out)], deadline_s, least_s, read_number, gpus)


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_rest(tmp_path: Path) -> None:
    chosen = [
        part("breaks", f"{WRITES}; print('error: the bolt is loose'); sys.exit(1)"),
        part("dies", "import os; os.kill(os.getpid(), 9)"),
        part("hangs", f"{WRITES}; import time; print('waiting', flush=True); time.sleep(99)", deadline_s=3.0),
        part("says nothing", "pass"),
        part("large", WRITES, gpus=2),
        part("works", WRITES),
    ]
    outcomes = {one.part: one for one in check(chosen, tmp_path, gpus=1, limit_s=99.0, env={})}
    assert {name: one.status for name, one in outcomes.items()} == {
        "breaks": "failed",
        "dies": "failed",
        "hangs": "timeout",
        "says nothing": "failed",
        "large": "skipped",
        "works": "ok",
    }
    assert outcomes["breaks"].summary == "found 7; exit code 1: the bolt is loose"
    assert outcomes["dies"].summary.startswith("signal SIGKILL")
    assert outcomes["hangs"].summary == "found 7; did not end within 3 s: waiting"  # what it left counts
    assert outcomes["says nothing"].summary.startswith("its results cannot be read: FileNotFoundError")
    assert "needs 2 GPUs" in line(outcomes["large"])
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(one["part"], one["status"]) for one in report["parts"]] == [(n, o.status) for n, o in outcomes.items()]
    assert report["parts"][-1]["figures"] == {"number": 7}
    assert "waiting" in Path(outcomes["hangs"].log).read_text()


@pytest.mark.slow
def test_the_limit_ends_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "END_S", 1.0)
    monkeypatch.setattr(gpu_check, "SHORTEST_S", 1.0)
    hangs = "import time; time.sleep(99)"
    chosen = [part("slow", hangs, deadline_s=50.0), part("late", WRITES, least_s=0.0)]
    start = time.monotonic()
    slow, late = check(chosen, tmp_path, gpus=1, limit_s=5.0, env={})
    assert time.monotonic() - start < 20
    assert (slow.status, late.status) == ("timeout", "no time")


@pytest.mark.slow
def test_parts_that_hang_leave_the_others_their_least_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "END_S", 1.0)
    monkeypatch.setattr(gpu_check, "SHORTEST_S", 1.0)
    hangs = "import time; time.sleep(99)"
    works = f"import os; assert float(os.environ['COLLAB_MEGATRON_GPU_PART_S']) >= 5; {WRITES}"
    chosen = [
        part("hangs", hangs, deadline_s=99.0),
        part("too", hangs, deadline_s=99.0, least_s=3.0),
        part("large", WRITES, gpus=2, least_s=99.0),  # does not run, so nothing waits for it
        part("works", works, least_s=6.0),
    ]
    start = time.monotonic()
    outcomes = check(chosen, tmp_path, gpus=1, limit_s=14.0, env={})
    assert [one.status for one in outcomes] == ["timeout", "timeout", "skipped", "ok"], outcomes
    assert time.monotonic() - start < 14


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gpus", [1, 2])
def test_if_every_part_hangs_all_have_had_their_least_time(device: str, gpus: int, tmp_path: Path) -> None:
    chosen = [one for one in parts(device, "", tmp_path) if one.by_default]
    spent = 0.0
    for number, one in enumerate(chosen, start=1):
        if one.gpus <= gpus:
            given = min(one.deadline_s, room_s(LIMIT_S[gpus] - spent, chosen[number:], gpus))
            assert given >= one.least_s > SHORTEST_S, one.name
            spent += given + END_S
    assert spent <= LIMIT_S[gpus] <= {1: 570.0, 2: 1500.0}[gpus]  # a GPU is often given for ten minutes


@pytest.mark.slow
def test_tests_on_a_gpu_fail_before_the_check_ends_them() -> None:
    """By their own deadlines, which leave a reason; and no server captures graphs within them."""
    shows = "from tests.gpu import engines as e, test_ranks as r; print(e.START_S, r.ALL_S, *e.NO_GRAPHS)"
    env = {"COLLAB_MEGATRON_GPU_PART_S": "120", "COLLAB_MEGATRON_GPU_TESTS": "cuda", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", shows],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["80.0", "90.0", "--disable-cuda-graph"]


def test_flags_for_engines_reach_the_programs_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also a single one, which argparse would take for an option of its own."""
    for flags in ("", "--disable-overlap-schedule", "--attention-backend triton --sampling-backend pytorch"):
        (sync,) = (one for one in parts("cuda", flags, tmp_path) if one.name == "weight sync")
        monkeypatch.setattr(sys, "argv", sync.argv(tmp_path / "x.json"))
        found = shlex.split(weight_sync.parse().engine_args)
        assert found == [*shlex.split(flags), "--disable-cuda-graph"]
        (steps,) = (one for one in parts("cuda", flags, tmp_path) if one.name == "RL steps")
        assert f"--engine-args={flags}" in steps.argv(tmp_path / "x.json")


@pytest.mark.slow
def test_the_children_of_a_part_end_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(99)"
    )
    check([part("parent", code, deadline_s=3.0)], tmp_path / "out", gpus=1, limit_s=99.0, env={})
    state = Path("/proc", pid.read_text(), "stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
        assert time.monotonic() < deadline, "the child of a killed part goes on"
        time.sleep(0.05)


XML = """<testsuites><testsuite>
<testcase name="a" time="1.5"/>
<testcase name="b" time="2"><failure message="AssertionError: first&#10;assert 1 == 2">trace</failure></testcase>
<testcase name="c" time="0"><skipped message="needs 2 GPUs, 1 are visible"/></testcase>
</testsuite></testsuites>"""


def test_what_pytest_leaves_is_read(tmp_path: Path) -> None:
    (tmp_path / "all.xml").write_text(XML)
    found = results.pytest_xml(tmp_path / "all.xml")
    assert found.summary == "1 passed, 1 failed, 1 skipped: b"
    assert found.figures[1] == {"test": "b", "result": "failed", "seconds": 2.0, "why": "assert 1 == 2"}
    assert not found.nothing_ran
    skipped = "".join(part for part in XML.splitlines(keepends=True) if "testsuite" in part or 'name="c"' in part)
    (tmp_path / "skipped.xml").write_text(skipped)
    found = results.pytest_xml(tmp_path / "skipped.xml")
    assert found.summary == "1 skipped (needs 2 GPUs, 1 are visible)"
    assert found.nothing_ran


def test_rows_of_the_benchmarks_become_one_line(tmp_path: Path) -> None:
    rows = [
        {"shape": "qwen2.5-1.5b", "phase": "logprobs", "tokens_per_s": 9e4, "mfu": 0.433, "ratio": 1.5},
        {"shape": "qwen2.5-1.5b", "phase": "step", "tokens_per_s": 9e3, "mfu": 0.35},
        {"shape": "qwen2.5-1.5b", "phase": "more", "skipped": "out of memory: 20 MiB"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert results.train_step(tmp_path / "rows.json").summary == (
        "qwen2.5-1.5b: logprobs MFU 43.3% (1.50 x transformers), step MFU 35.0% (alone), more out of memory: 20 MiB"
    )
    skipped = [{"shape": "1b", "transport": "ipc", "skipped": "needs 2 GPUs, there are 1"}]
    (tmp_path / "sync.json").write_text(json.dumps(skipped))
    assert results.weight_sync(tmp_path / "sync.json").nothing_ran


def test_the_environment_tells_how_far_the_attention_is_off(tmp_path: Path) -> None:
    found = {"python": "3.12", "packages": {}}
    for attention, expected in (
        ({"differs": 0.0123, "bound": 0.04}, "a packed row differs by 1.23% (bound 4%)"),
        ({"failed": "no kernel image", "bound": 0.04}, "a packed row: no kernel image"),
    ):
        (tmp_path / "facts").write_text(json.dumps(found | {"packed_attention": attention}))
        assert expected in results.environment(tmp_path / "facts").summary


def step(number: int, **changes: float) -> dict[str, float]:
    good = {
        "step": number,
        "time_s/step": 2.0,
        "sync/engines_lost": 0.0,
        "sync/checked": 14.0,
        "sync/probe_gap": 0.01 * number,
        "reward/mr_mean": 0.1 * number,
        "train/logprob_gap": 0.02,
    }
    return {**good, **changes}


def test_rl_steps_are_judged_by_the_dashboard() -> None:
    found = figures([{"step": 0, "eval/mr": 0.0}, step(1), step(2)], 2)
    assert found["probe_gap_max"] == pytest.approx(0.02)
    assert found["reward_first"] == pytest.approx(0.1)
    assert found["step_s"] == 2.0
    for rows, says in (
        ([step(1)], r"the steps \[1\] instead of 1 to 2"),
        ([step(1), step(2, **{"sync/engines_lost": 1.0})], "1 servers were lost"),
        ([step(1), step(2, **{"sync/checked": 0.0})], "compared no checksums"),
    ):
        with pytest.raises(RunError, match=says):
            figures(rows, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_names_programs_and_tests_that_exist(device: str, tmp_path: Path) -> None:
    known = parts(device, "", tmp_path)
    assert len({one.name for one in known}) == len(known)
    for one in known:
        script = next(word for word in one.argv(tmp_path / "x.json") if ".py" in word)
        path, _, test = script.partition("::")
        text = (REPOSITORY / path).read_text()
        assert f"def {test.partition('[')[0] or 'main' * path.startswith('/')}" in text
    assert all(one.gpus == 2 for one in known if one.name.startswith("two"))
    assert [one.name for one in known if not one.by_default] == ["SFT run"]
    names = [one.name for one in known]
    assert names.index("RL steps") < min(names.index("MFU"), names.index("head"))
    assert sorted(STEPS) == ["cpu", "cuda"]


def run_check(run: Run, *arguments: str) -> Ended:
    return run("tools/gpu_check.py", *arguments)


@pytest.mark.slow
def test_mistakes_end_with_2(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for arguments, says in (
        (("--device", "cpu", "--out", str(tmp_path / "full")), "is not empty"),
        (("--device", "cpu", "--out", str(tmp_path / "new"), "--parts", "haed"), "'haed' is none of the parts"),
    ):
        ended = run_check(run, *arguments)
        assert (ended.code, len(ended.errors)) == (2, 1)
        assert says in ended.errors[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no GPU is visible" in run_check(run).errors[0]


@pytest.mark.slow
def test_two_parts_for_real_on_the_cpu(run: Run, tmp_path: Path) -> None:
    """The environment, and one layout of tests/gpu against transformers."""
    ended = run_check(run, "--device", "cpu", "--out", str(tmp_path), "--parts", "environment")
    assert ended.code == 0, ended.output
    (environment,) = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert environment["status"] == "ok"
    assert environment["figures"]["packages"]["torch"]
    assert environment["figures"]["backend"]["name"] == "cpu"
    assert f"Python {sys.version.split()[0]}" in ended.output
