"""Tokens per second of log-probs, gradients and whole steps: the Megatron-Core actor against plain transformers.

    python tools/bench/train_step.py [--shapes 8m 135m] [--dtypes float32 bfloat16] [--threads 1] [--json FILE]

Both sides get the same random model, tokens, threads and loss in one process, and must agree first. They take turns, so
that other load slows both. A row holds medians; `ratio` is ours / theirs in tokens/s (above 1: ours is faster). Phases:
`logprobs` (forward only, with entropy), `forward_backward`, `step` (with clipping and AdamW).

transformers runs AutoModelForCausalLM with sdpa and without key-value cache, log_softmax and gather in fp32,
clip_grad_norm_, torch's fused AdamW. The actor keeps fp32 master weights of a bf16 model; so does the reference of a
bf16 `step`. `transformers_no_masters_tokens_per_s` is AdamW on the bf16 weights themselves, which loses small updates:
not with --only-masters. Where both do not fit into a GPU, and with --alone, a row has our figures only: no comparison.
`--packing`: samples of unequal length, ours packed, theirs padded, as sdpa has no packing. Counts real tokens only.
`--batch grpo`: short replies to long prompts; on a CPU and packed, ours computes a prompt once for its replies, as in
training. `--micro-batches`: so many of them in a call, with gradients accumulated. MFU counts the logits of trained
tokens only, on both sides, although transformers computes all.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, Python finds only tools/bench/

from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import publish_json
from tools.bench.train_step_batches import KINDS, SHAPES, Call, Dtype, make_batches, make_model

if TYPE_CHECKING:
    from torch import Tensor

    from collab_megatron.trainer.actor.actor import Actor, LossFn, StepResult
    from collab_megatron.trainer.batching.micro_batch import MicroBatch

PHASES = ("logprobs", "forward_backward", "step")
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
WARM_UPS = 2
LR = 1e-6
# Largest differences of the two sides: mean of a token's log-prob (spread 1 to 1.5); relative loss and gradient norm.
# In bf16 each side is as far from fp32 as from the other: 30 layers of rounding.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (0.1, 0.05)}


@dataclass(frozen=True)
class TrainStepRow:
    shape: str
    dtype: str
    phase: str
    tokens: int  # of one call; padding not counted
    threads: int
    packing: bool
    tokens_per_s: float
    transformers_tokens_per_s: float | None = None  # None: only ours was measured
    ratio: float | None = None
    transformers_no_masters_tokens_per_s: float | None = None  # `step` in bf16 only
    mfu: float | None = None  # share of the device's peak; where that is known
    transformers_mfu: float | None = None
    batch: str = "sft"
    micro_batches: int = 1
    trained_share: float | None = None  # of the tokens


@dataclass(frozen=True)
class Skipped:
    shape: str
    dtype: str
    phase: str
    skipped: str  # why


class Reference:
    """Plain transformers and torch, on the same micro-batches in padded form."""

    def __init__(self, folder: Path, dtype: Dtype, batches: Sequence[MicroBatch], loss_fn: LossFn, device: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self.model = model.to(device).train()
        self.batches, self.loss_fn = [batch.to(device) for batch in batches], loss_fn
        self.trained = sum(batch.num_trained_tokens for batch in batches)
        self.weights: list[Any] = list(self.model.parameters())

    def make_step(self, *, masters: bool) -> Callable[[], None]:
        """A whole step with an AdamW of its own: on fp32 copies of the weights, or on the weights themselves."""
        import torch

        stepped = [w.detach().float().requires_grad_() for w in self.weights] if masters else self.weights
        optimizer = torch.optim.AdamW(stepped, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        pairs = list(zip(stepped, self.weights, strict=True)) if masters else []
        for master, _ in pairs:
            master.grad = torch.empty_like(master)

        def step() -> None:
            self.gradients()
            for master, weight in pairs:
                master.grad.copy_(weight.grad)
            torch.nn.utils.clip_grad_norm_(stepped, 1.0)
            optimizer.step()
            with torch.no_grad():
                for master, weight in pairs:
                    weight.copy_(master)

        return step

    def statistics(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, S]: log-prob of each token and the entropy there: fp32 [B, S], zero in the first column."""
        import torch
        import torch.nn.functional as F

        scores = torch.log_softmax(self.model(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(dim=-1)
        # the next token's, at all positions and then shifted: a slice of the logits would be a copy of them
        logprobs = scores.gather(-1, ids.roll(-1, dims=1)[..., None])[..., 0]
        return F.pad(logprobs[:, :-1], (1, 0)), F.pad(entropy[:, :-1], (1, 0))

    def logprobs(self) -> list[Tensor]:
        """[B, S] per micro-batch."""
        import torch

        with torch.no_grad():
            found = [self.statistics(batch.ids) for batch in self.batches]
        on_host = [(logprobs.cpu(), entropy.cpu()) for logprobs, entropy in found]  # both, as ours returns them
        return [logprobs for logprobs, _ in on_host]

    def gradients(self) -> float:
        """The loss."""
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in self.batches:
            loss = self.loss_fn(self.statistics(batch.ids)[0], batch).loss / self.trained
            loss.backward()
            total += float(loss.detach())
        return total


class Ours:
    """The actor on the same samples, padded or packed."""

    def __init__(self, actor: Actor, batches: Sequence[MicroBatch], loss_fn: LossFn) -> None:
        self.actor, self.batches = actor, batches
        self.trained = sum(batch.num_trained_tokens for batch in batches)
        self.step_arguments = (batches, loss_fn, self.trained)

    def logprobs(self) -> list[Tensor]:
        """[B, S] per micro-batch, 0 where nothing is trained."""
        return self.actor.logprobs(self.batches)[0]

    def gradients(self) -> None:
        self.actor._gradients(*self.step_arguments)  # train_step without the optimizer: only a benchmark wants that

    def step(self) -> StepResult:
        return self.actor.train_step(*self.step_arguments)


def check_same(ours: Ours, reference: Reference, dtype: Dtype) -> None:
    """Log-probs, loss and gradient norm of both sides before the first update. Raises RunError where they differ."""
    import torch

    pairs = zip(_trained(ours.batches, ours.logprobs()), _trained(reference.batches, reference.logprobs()), strict=True)
    apart = torch.cat([a - b for a, b in pairs]).abs().mean().item()
    wanted_loss = reference.gradients()
    norms = [w.grad.float().norm() for w in reference.weights if w.grad is not None]
    wanted_norm = float(torch.stack(norms).norm())
    result = ours.step()
    loss, norm = result.metrics["loss"], result.grad_norm
    per_token, relative = TOLERANCE[dtype]
    for what, difference, tolerance in (
        ("log-probs", apart, per_token),
        ("losses", abs(loss - wanted_loss) / max(abs(wanted_loss), 1.0), relative),
        ("gradient norms", abs(norm - wanted_norm) / wanted_norm, relative),
    ):
        if not difference <= tolerance:
            raise RunError(f"the {what} of actor and transformers differ by {difference:.2g}, above {tolerance:g}")


def _trained(batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> Iterator[Tensor]:
    """The values of each sample's trained tokens, in the order in which the samples were made."""
    for batch, found in zip(batches, values, strict=True):
        by_sample = zip(batch.sample_indices, batch.per_sample(found), batch.per_sample(batch.mask.cpu()), strict=True)
        for _, sample, mask in sorted(by_sample, key=lambda entry: entry[0]):
            yield sample[mask > 0]


def interleaved(sides: Sequence[Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of each side; they take turns, and the turns change direction."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(WARM_UPS + repeats):
        for i in range(len(sides))[:: 1 if turn % 2 else -1]:
            start = clock()
            sides[i]()
            seconds[i].append(clock() - start)
    return [statistics.median(times[WARM_UPS:]) for times in seconds]


def gpu_clock() -> float:
    """The time after the GPU has finished its work."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


class Comparison:
    """One shape in one dtype: both sides built, checked, and ready to be measured."""

    def __init__(self, name: str, dtype: Dtype, call: Call, *, alone: bool = False, only_masters: bool = False) -> None:
        """alone: without transformers' side. only_masters: without its step on the bf16 weights themselves."""
        from collab_megatron.config.sections import AlgorithmSection, OptimizerSection
        from collab_megatron.trainer.actor.actor import Actor
        from collab_megatron.trainer.actor.grid import grid
        from collab_megatron.trainer.loss.policy_step import make_policy_loss

        self.name, self.dtype, self.call, self.only_masters = name, dtype, call, only_masters
        loss_fn = make_policy_loss(AlgorithmSection())
        with tempfile.TemporaryDirectory() as work:
            make_model(SHAPES[name], dtype, Path(work))
            self.device = grid().device
            section = OptimizerSection(lr=LR)
            actor = Actor.build(work, dtype=dtype, grid=grid(), optimizer=section, total_steps=10**6)
            batches, padded = make_batches(SHAPES[name], call, share=self.device.type == "cpu")
            self.reference = None if alone else Reference(Path(work), dtype, padded, loss_fn, self.device)
        self.spec = actor.spec
        self.ours = Ours(actor, batches, loss_fn)
        if self.reference is not None:
            check_same(self.ours, self.reference, dtype)

    def row(self, phase: str, repeats: int, cpu_time: bool) -> TrainStepRow:
        import torch

        from collab_megatron.model.flops import forward_flops, peak_flops, train_flops

        in_bf16 = phase == "step" and self.dtype == "bfloat16"
        no_masters = in_bf16 and not self.only_masters
        ours, theirs = self.ours, self.reference
        sides: list[Callable[[], Any]]
        if phase == "step":
            sides = [ours.step]
            if theirs is not None:
                kinds = (True, False) if no_masters else (in_bf16,)
                sides += [theirs.make_step(masters=masters) for masters in kinds]
        elif phase == "forward_backward":
            sides = [side.gradients for side in (ours, theirs) if side is not None]
        else:
            sides = [side.logprobs for side in (ours, theirs) if side is not None]
        on_gpu = self.device.type == "cuda"
        clock = gpu_clock if on_gpu else time.process_time if cpu_time else time.perf_counter
        seconds = interleaved(sides, repeats, clock)
        lengths = [length for batch in ours.batches for length in batch.lengths]
        peak = peak_flops(torch.cuda.get_device_name()) if on_gpu and self.dtype == "bfloat16" else None
        flops = (forward_flops if phase == "logprobs" else train_flops)(self.spec, lengths, ours.trained)
        speeds = [sum(lengths) / t for t in seconds]
        compared = theirs is not None
        return TrainStepRow(
            shape=self.name,
            dtype=self.dtype,
            phase=phase,
            tokens=sum(lengths),
            threads=torch.get_num_threads(),
            packing=self.call.packing,
            batch=self.call.kind,
            micro_batches=self.call.micro_batches,
            trained_share=ours.trained / sum(lengths),
            tokens_per_s=speeds[0],
            transformers_tokens_per_s=speeds[1] if compared else None,
            ratio=speeds[0] / speeds[1] if compared else None,
            transformers_no_masters_tokens_per_s=speeds[2] if compared and no_masters else None,
            mfu=flops / seconds[0] / peak if peak else None,
            transformers_mfu=flops / seconds[1] / peak if compared and peak else None,
        )


def measure(args: argparse.Namespace) -> Iterator[TrainStepRow | Skipped]:
    """All phases of all shapes in all dtypes. Where both sides do not fit, ours is measured alone from there on."""
    import torch

    call = Call(args.batch, args.micro_batches, args.packing, args.tokens)
    for name in args.shapes:
        for dtype in args.dtypes:
            alone = args.alone
            comparison: Comparison | None = None
            for phase in args.phases:
                row: TrainStepRow | Skipped | None = None
                while row is None:
                    try:
                        comparison = comparison or Comparison(
                            name, dtype, call, alone=alone, only_masters=args.only_masters
                        )
                        row = comparison.row(phase, args.repeats, args.cpu_time)
                    except torch.OutOfMemoryError as error:
                        reason = f"out of memory: {str(error).splitlines()[0]}"
                    if row is None:  # here: the error holds the frames of what did not fit
                        comparison = None
                        _free_memory()
                        row = Skipped(name, dtype, phase, reason) if alone else None
                        alone = True
                yield row
            comparison = None
            _free_memory()


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(row: TrainStepRow | Skipped) -> str:
    """For people."""
    head = f"{row.shape:14s} {row.dtype:9s} {row.phase:17s}"
    if isinstance(row, Skipped):
        return f"{head} skipped: {row.skipped}"
    text = f"{head} {row.tokens_per_s:10.1f} tokens/s"
    if row.transformers_tokens_per_s is not None:
        text += f", transformers {row.transformers_tokens_per_s:10.1f}, ratio {row.ratio:.3f}"
    if row.transformers_no_masters_tokens_per_s is not None:
        text += f" ({row.tokens_per_s / row.transformers_no_masters_tokens_per_s:.3f} to AdamW on bf16 weights)"
    if row.mfu is not None:
        text += f", MFU {row.mfu:.1%}" + (f" and {row.transformers_mfu:.1%}" if row.transformers_mfu else "")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/bench/train_step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 8m 135m; on CUDA qwen2.5-1.5b")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both; on CUDA bfloat16")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--repeats", type=int, default=5, help="measured calls of each side")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    cpu_time = "measure the process's CPU time instead of the wall clock's, for a busy machine; needs --threads 1"
    parser.add_argument("--cpu-time", action="store_true", help=cpu_time)
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch; default: the shape's own")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of a call")
    parser.add_argument("--batch", choices=KINDS, default="sft", help="see above")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, help="see above; default: on CUDA")
    parser.add_argument("--alone", action="store_true", help="ours only, for what does not fit twice; not compared")
    parser.add_argument("--only-masters", action="store_true", help="see above")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, as a list, after each row")
    args = parser.parse_args()
    if (
        args.repeats < 1
        or (args.tokens is not None and args.tokens < 8)
        or min(args.threads or 1, args.micro_batches) < 1
    ):
        raise UserError("--repeats, --threads and --micro-batches must be at least 1, --tokens at least 8")
    if args.cpu_time and args.threads != 1:
        raise UserError("--cpu-time counts all threads together: give --threads 1 with it")
    return args


def main() -> None:
    args = arguments()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        os.environ.pop(name, None)  # one process, also inside a Slurm step
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch loads, and by init_grid
    import torch

    from collab_megatron.config.sections import ParallelSection
    from collab_megatron.trainer.actor.grid import close_grid, init_grid

    on_gpu = torch.cuda.is_available()
    args.shapes = args.shapes or (["qwen2.5-1.5b"] if on_gpu else ["8m", "135m"])
    args.dtypes = args.dtypes or (["bfloat16"] if on_gpu else list(DTYPES))
    args.packing = on_gpu if args.packing is None else args.packing
    init_grid(ParallelSection(), seed=1)
    rows = []
    for row in measure(args):
        print(line(row), flush=True)
        rows.append({name: value for name, value in asdict(row).items() if value is not None})
        if args.json:
            publish_json(args.json, rows)
    close_grid()


if __name__ == "__main__":
    run_cli(main)
