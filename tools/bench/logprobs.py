"""Peak memory and time of the output head: log_softmax of whole fp32 logits against trainer/actor/logprobs.py.

    python tools/bench/logprobs.py [--tokens 4096 --vocab 49152 --hidden 576] [--dtypes float32 bfloat16] [--json FILE]

Rows: `naive` (logits.float().log_softmax, gather, entropy without gradient), `ours, kept` (the softmax is kept for the
backward pass), `ours, chunked` (at most --chunk-mb of fp32 logits, recomputed in the backward pass). On a GPU those two
are Triton's, and `torch, kept` and `torch, chunked` what a CPU uses. The head computes trained tokens only: to see what
a batch of long prompts costs, give --tokens those that are trained.

Memory is what forward and backward pass take over the inputs, gradients included. On a CPU each row has a fresh process
of its own, and the kernel's high-water mark is read (VmHWM of /proc/self/status, so Linux only: ru_maxrss would start
from the parent's); on a GPU it is torch.cuda.max_memory_allocated. Times are taken in one process, the rows in turn,
and the best of --repeats is given, so that whatever else the machine does slows all alike; `cpu_s` is the processor
time of all threads. `forward` runs without gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import publish_json

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "bfloat16")
VARIANTS = ("naive", "ours, kept", "ours, chunked")
WITHOUT_TRITON = ("torch, kept", "torch, chunked")  # on a GPU, besides
EVERYTHING = 2**62  # chunk bytes that any logits fit into


@dataclass(frozen=True)
class HeadInputs:
    """The inputs of all variants."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    chunk_mb: int
    threads: int
    device: str


@dataclass(frozen=True)
class HeadRow:
    """Memory and times of one variant."""

    variant: str
    dtype: str
    peak_mib: float  # forward and backward pass, over the inputs
    forward_s: float
    forward_backward_s: float
    forward_backward_cpu_s: float
    speedup: float  # naive's forward_backward_s / this one's


class Heads:
    """The variants over one set of inputs."""

    def __init__(self, inputs: HeadInputs) -> None:
        import torch

        torch.set_num_threads(inputs.threads)
        self.inputs = inputs
        device, dtype = torch.device(inputs.device), getattr(torch, inputs.dtype)
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.weight = (
            (torch.randn(rows, inputs.hidden, generator=generator) * scale).to(device, dtype).requires_grad_()
            for rows, scale in ((inputs.tokens, 1.0), (inputs.vocab, inputs.hidden**-0.5))
        )
        self.labels = torch.randint(0, inputs.vocab, (inputs.tokens,), generator=generator).to(device)

    def forward(self, variant: str) -> tuple[Tensor, Tensor]:
        """Log-probability of the label and entropy, [tokens] fp32."""
        import torch

        from collab_megatron.trainer.actor import logprobs as head

        if variant != "naive":
            without = variant in WITHOUT_TRITON
            with patch.object(head, "_triton_head", lambda: None) if without else contextlib.nullcontext():
                return head.head_logprobs(
                    self.hidden,
                    self.weight,
                    self.labels,
                    vocab=self.inputs.vocab,
                    chunk_bytes=EVERYTHING if variant.endswith("kept") else self.inputs.chunk_mb * 2**20,
                )
        every = (self.hidden @ self.weight.t()).float().log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -(every.exp() * every).sum(dim=-1)
        return every.gather(1, self.labels[:, None])[:, 0], entropy

    def forward_only(self, variant: str) -> None:
        import torch

        with torch.no_grad():
            self.forward(variant)

    def forward_backward(self, variant: str) -> None:
        self.hidden.grad = self.weight.grad = None
        self.forward(variant)[0].sum().backward()

    def peak_mib(self, variant: str) -> float:
        """On a CPU it is that of the process so far: ask a fresh one, once."""
        import torch

        if self.inputs.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.forward_backward(variant)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        small = Heads(HeadInputs(8, 16, 8, self.inputs.dtype, 1, self.inputs.threads, "cpu"))
        small.forward_backward(variant)  # libraries load their code on first use
        before_kib, peak_before = _status_kib("VmRSS"), _status_kib("VmHWM")
        self.forward_backward(variant)
        peak = _status_kib("VmHWM")
        if peak == peak_before:
            raise RunError("the sizes are too small: the process's start took more memory than the measured work")
        return (peak - before_kib) / 1024


def _status_kib(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _seconds(work: Callable[[], None], cuda: bool) -> tuple[float, float]:
    """Wall and processor seconds of one run."""
    import torch

    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _peak_in_fresh_process(inputs: HeadInputs, variant: str) -> float:
    request = json.dumps({"inputs": asdict(inputs), "variant": variant})
    done = subprocess.run([sys.executable, __file__, "--peak-of", request], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"measuring the memory of {variant} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def measure(inputs: HeadInputs, repeats: int) -> list[HeadRow]:
    """One row per variant; the naive one's fp32 matrices must fit in memory."""
    cuda = inputs.device == "cuda"
    heads = Heads(inputs)
    variants = VARIANTS + (WITHOUT_TRITON if cuda else ())
    peaks = {v: heads.peak_mib(v) if cuda else _peak_in_fresh_process(inputs, v) for v in variants}
    forward: dict[str, list[float]] = {v: [] for v in variants}
    both: dict[str, list[tuple[float, float]]] = {v: [] for v in variants}
    for repeat in range(repeats + 1):
        for variant in variants:
            without = _seconds(partial(heads.forward_only, variant), cuda)[0]
            whole = _seconds(partial(heads.forward_backward, variant), cuda)
            if repeat:  # the first round warms up
                forward[variant].append(without)
                both[variant].append(whole)
    wall = {v: min(seconds for seconds, _ in both[v]) for v in variants}
    return [
        HeadRow(
            variant=v,
            dtype=inputs.dtype,
            peak_mib=peaks[v],
            forward_s=min(forward[v]),
            forward_backward_s=wall[v],
            forward_backward_cpu_s=min(cpu for _, cpu in both[v]),
            speedup=wall["naive"] / wall[v],
        )
        for v in variants
    ]


def table(rows: Sequence[HeadRow]) -> str:
    """The rows as text, one line each."""
    lines = [
        f"{'head':<14} {'dtype':<9} {'peak MiB':>9} {'forward s':>10} {'f+b s':>8} {'f+b cpu s':>10} {'speedup':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row.variant:<14} {row.dtype:<9} {row.peak_mib:>9.0f} {row.forward_s:>10.3f} "
            f"{row.forward_backward_s:>8.3f} {row.forward_backward_cpu_s:>10.3f} {row.speedup:>8.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        prog="python tools/bench/logprobs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--chunk-mb", type=int, default=64, help="fp32 logits that `ours, chunked` may hold")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of is not None:
        request = json.loads(args.peak_of)
        print(Heads(HeadInputs(**request["inputs"])).peak_mib(request["variant"]))
        return
    if min(args.tokens, args.vocab, args.hidden, args.chunk_mb, args.threads, args.repeats) < 1:
        raise UserError("sizes, --chunk-mb, --threads and --repeats must be at least 1")
    rows: list[HeadRow] = []
    for dtype in args.dtypes:
        inputs = HeadInputs(args.tokens, args.vocab, args.hidden, dtype, args.chunk_mb, args.threads, args.device)
        rows += measure(inputs, args.repeats)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"{args.tokens} tokens, vocabulary {args.vocab}, hidden {args.hidden}; {where}")
    print(table(rows))
    if args.json is not None:
        sizes = {"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden, "chunk_mb": args.chunk_mb}
        publish_json(
            args.json, {**sizes, "threads": args.threads, "where": where, "rows": [asdict(row) for row in rows]}
        )


if __name__ == "__main__":
    run_cli(main)
