"""tools/bench/train_step.py on a tiny shape: rows, check, errors; its speeds mean nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.trainer.parallel.ranks import Ran, run_script
from tools.bench.train_step import interleaved

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path) -> Ran:
    return run_script(ROOT / "tools" / "bench" / "train_step.py", *arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Ran, Path]]:
    """Padded and packed, side by side."""
    folder = tmp_path_factory.mktemp("rows")
    common = ("--shapes", "tiny", "--threads", "1", "--repeats", "1", "--tokens", "48", "--json")
    files = {False: folder / "no-packing.json", True: folder / "packing.json"}
    with ThreadPoolExecutor() as pool:
        running = {packing: pool.submit(run, *common, file, f"--{file.stem}") for packing, file in files.items()}
    return {packing: (running[packing].result(), file) for packing, file in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_row_for_every_phase(measured: dict[bool, tuple[Ran, Path]], packing: bool) -> None:
    done, output = measured[packing]
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    wanted = [
        ("tiny", dtype, phase)
        for dtype in ("float32", "bfloat16")
        for phase in ("logprobs", "forward_backward", "step")
    ]
    assert [(row["shape"], row["dtype"], row["phase"]) for row in rows] == wanted
    assert len(done.stdout.splitlines()) == len(rows)
    for row in rows:
        assert row["tokens"] == 48
        assert row["packing"] is packing
        assert row["threads"] == 1
        assert row["tokens_per_s"] > 0
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["transformers_tokens_per_s"])
        assert ("transformers_no_masters_tokens_per_s" in row) == (
            row["phase"] == "step" and row["dtype"] == "bfloat16"
        )
        assert "mfu" not in row  # nobody knows this CPU's peak


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--repeats", "0"], "--repeats"),
        (["--tokens", "2"], "--tokens"),
        (["--cpu-time"], "--threads 1"),
        (["--shapes", "70b"], "70b"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_the_sides_take_turns_and_warm_ups_do_not_count() -> None:
    turns: list[str] = []
    ticks = iter(range(100))
    medians = interleaved([lambda: turns.append("a"), lambda: turns.append("b")], 3, lambda: float(next(ticks)))
    assert "".join(turns) == "baabbaabba"  # two warm-ups and three measured turns
    assert medians == [1.0, 1.0]
