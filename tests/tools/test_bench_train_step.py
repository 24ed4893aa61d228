"""tools/bench/train_step.py on a tiny shape: rows, check, errors; its speeds mean nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from collab_megatron.trainer.actor import grid
from tests.config.table import run_main
from tests.trainer.parallel.ranks import Ran, run_script
from tools.bench import train_step
from tools.bench.train_step import Skipped, TrainStepRow, interleaved, measure
from tools.bench.train_step_batches import REPLIES, SHAPES, Call, make_batches

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path) -> Ran:
    return run_script(ROOT / "tools" / "bench" / "train_step.py", *arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Ran, Path]]:
    """Padded, and packed with replies to shared prompts in two micro-batches, side by side."""
    folder = tmp_path_factory.mktemp("rows")
    common = ("--shapes", "tiny", "--threads", "1", "--repeats", "1", "--tokens", "48", "--json")
    files = {False: folder / "no-packing.json", True: folder / "packing.json"}
    more = {False: (), True: ("--batch", "grpo", "--micro-batches", "2")}
    with ThreadPoolExecutor() as pool:
        running = {
            packing: pool.submit(run, *common, file, f"--{file.stem}", *more[packing])
            for packing, file in files.items()
        }
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
        assert row["tokens"] == (96 if packing else 48)
        assert (row["batch"], row["micro_batches"]) == (("grpo", 2) if packing else ("sft", 1))
        assert row["trained_share"] == pytest.approx(0.25 if packing else 0.75, abs=0.06)
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
        (["--micro-batches", "0"], "--micro-batches"),
        (["--shapes", "70b"], "70b"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_main(train_step.main, ["train_step.py", *arguments], capsys)
    assert done.code == 2
    assert says in done.err


def test_a_grpo_batch_is_groups_of_short_replies_to_long_prompts() -> None:
    ours, padded = make_batches(SHAPES["tiny"], Call("grpo", 2, packing=True, tokens=160), share=True)
    assert [batch.sample_indices == tuple(range(len(batch.lengths))) for batch in padded] == [True, True]
    for batch, rows in zip(ours, padded, strict=True):
        assert sum(batch.lengths) == sum(rows.lengths) == 160
        assert batch.num_trained_tokens == rows.num_trained_tokens < 0.35 * 160
        assert max(len(group.own) for group in batch.groups) <= REPLIES
        assert batch.num_tokens < 160, "no prompt is shared"
    assert not torch.equal(ours[0].ids, ours[1].ids[:, : ours[0].ids.shape[1]])


def test_the_sides_take_turns_and_warm_ups_do_not_count() -> None:
    turns: list[str] = []
    ticks = iter(range(100))
    medians = interleaved([lambda: turns.append("a"), lambda: turns.append("b")], 3, lambda: float(next(ticks)))
    assert "".join(turns) == "baabbaabba"  # two warm-ups and three measured turns
    assert medians == [1.0, 1.0]


class SmallGpu:
    """Stands in for Comparison on a GPU that holds some shapes once and none twice."""

    fits: Sequence[str] = ()
    built: list[bool]

    def __init__(self, name: str, dtype: str, call: Call, *, alone: bool, only_masters: bool) -> None:
        assert only_masters
        self.built.append(alone)
        self.name, self.alone = name, alone
        if name not in self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore")

    def row(self, phase: str, repeats: int, cpu_time: bool) -> TrainStepRow:
        if phase == "step" and not self.alone:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        ratio = None if self.alone else 1.5
        return TrainStepRow(self.name, "bfloat16", phase, 48, 1, True, 10.0, ratio and 5.0, ratio, mfu=0.4)


@pytest.fixture
def wanted() -> argparse.Namespace:
    return argparse.Namespace(
        shapes=["qwen2.5-1.5b", "qwen2.5-7b"],
        dtypes=["bfloat16"],
        phases=["logprobs", "step"],
        packing=True,
        batch="sft",
        micro_batches=1,
        tokens=None,
        repeats=1,
        cpu_time=False,
        alone=False,
        only_masters=True,
    )


def test_what_does_not_fit_twice_is_measured_alone(monkeypatch: pytest.MonkeyPatch, wanted: argparse.Namespace) -> None:
    monkeypatch.setattr(train_step, "Comparison", SmallGpu)
    monkeypatch.setattr(SmallGpu, "fits", ["qwen2.5-1.5b"])
    monkeypatch.setattr(SmallGpu, "built", [], raising=False)
    fast, step, *large = measure(wanted)
    assert isinstance(fast, TrainStepRow)
    assert fast.ratio == 1.5
    assert isinstance(step, TrainStepRow)
    assert (step.ratio, step.mfu) == (None, 0.4)
    reason = "out of memory: CUDA out of memory. Tried to allocate 20 MiB."
    assert large == [Skipped("qwen2.5-7b", "bfloat16", phase, reason) for phase in ("logprobs", "step")]
    assert train_step.line(step).endswith("10.0 tokens/s, MFU 40.0%")
    assert SmallGpu.built == [False, True, False, True, True]


def test_rows_are_written_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tools/gpu_check.py ends a benchmark at its deadline, and keeps what is there."""

    def until_the_deadline(args: argparse.Namespace) -> Iterator[TrainStepRow]:
        yield TrainStepRow("tiny", "bfloat16", "logprobs", 48, 1, True, 10.0)
        raise TimeoutError

    monkeypatch.setattr(train_step, "measure", until_the_deadline)
    monkeypatch.setattr(grid, "init_grid", lambda section, seed: None)
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(TimeoutError):
        train_step.main()
    assert [row["phase"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["logprobs"]


@pytest.mark.slow
def test_a_step_with_masters_only(tmp_path: Path) -> None:
    options = ("--shapes", "tiny", "--dtypes", "bfloat16", "--phases", "step", "--threads", "1", "--repeats", "1")
    done = run(*options, "--only-masters", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["ratio"] > 0
    assert "transformers_no_masters_tokens_per_s" not in row
