"""Run by test_actor_parallel.py on several ranks: every check of the actor for one layout, in one set of processes.

    actor_ranks.py WORK TENSOR DATA SEQUENCE_PARALLEL DISTRIBUTED

WORK/<kind> are model folders. The reference is plain PyTorch and transformers in this same process, on the whole batch.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from collab_megatron.actor.actor import Actor
from collab_megatron.actor.grid import RankGrid, agree, barrier, close_grid, init_grid
from collab_megatron.algorithms.losses import LossSum, grpo_loss
from collab_megatron.batching.micro_batch import MicroBatch, idle_like, split_by_tokens
from collab_megatron.config.sections import OptimizerSection, ParallelSection
from collab_megatron.convert.loader import SafetensorsFolder
from tests.parallel.tiny import make_samples

OPTIMIZER = OptimizerSection(
    lr=1e-3, schedule="linear", warmup_steps=1, min_lr=1e-4, weight_decay=0.1, clip_grad=0.05, beta2=0.95
)
STEPS = 3


def loss_fn(logprobs: Tensor, batch: MicroBatch) -> LossSum:
    return grpo_loss(
        logprobs,
        old_logprobs=batch.values["old_logprobs"],
        rollout_logprobs=batch.values["rollout_logprobs"],
        ref_logprobs=batch.values["ref_logprobs"],
        advantages=batch.values["advantages"],
        mask=batch.mask,
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.01,
        importance_cap=2.0,
    )


def reference_logprobs(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.log_softmax(model(ids).logits[:, :-1].float(), dim=-1)
    logprobs = logits.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)
    pad = partial(torch.nn.functional.pad, pad=(1, 0))
    return pad(logprobs), pad(entropy)


def reference_steps(folder: Path, batch: MicroBatch) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """STEPS steps of AdamW on the whole batch; what each step reported, and the weights after the last."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    reports = []
    # warm-up over one step that already has the full rate, then linear decay over the two steps left of three
    for lr in (1e-3, 1e-3, 1e-4 + 0.5 * 9e-4):
        for group in optimizer.param_groups:
            group["lr"] = lr
        logprobs, entropy = reference_logprobs(model, batch.ids)
        result = loss_fn(logprobs, batch)
        tokens = batch.num_trained_tokens
        optimizer.zero_grad()
        (result.loss / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        for p in model.parameters():
            p.grad.mul_(min(1.0, OPTIMIZER.clip_grad / (norm.item() + 1e-6)))
        optimizer.step()
        report = {name: value.item() / tokens for name, value in result.metrics.items()}
        entropy_sum = (entropy.detach() * batch.mask).sum().item()
        reports.append(
            {
                **report,
                "loss": result.loss.item() / tokens,
                "entropy": entropy_sum / tokens,
                "norm": norm.item(),
                "lr": lr,
            }
        )
    return reports, {name: p.detach() for name, p in model.named_parameters()}


def close(found: float, wanted: float, what: str, tolerance: float = 1e-5) -> None:
    assert abs(found - wanted) <= tolerance * max(abs(wanted), 1e-2), f"{what}: {found} instead of {wanted}"


def check_statistics(folder: Path, grid: RankGrid) -> float:
    """Log-probs and entropies against transformers; the largest difference."""
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=None)
    batches = split_by_tokens(make_samples(6), micro_batch_tokens=60, pad_id=0, pad_multiple=grid.pad_multiple)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    worst = 0.0
    for batch, logprobs, entropy in zip(batches, *actor.logprobs(batches), strict=True):
        with torch.no_grad():
            wanted, wanted_entropy = reference_logprobs(model, batch.ids)
        assert logprobs.dtype == torch.float32
        assert logprobs.shape == batch.ids.shape
        assert not logprobs[:, 0].any()
        # the whole sequence counts, padding too: it is hidden from the real tokens, not from itself
        worst = max(worst, (logprobs - wanted).abs().max().item(), (entropy - wanted_entropy).abs().max().item())
    assert worst < 1e-5, f"{folder.name}: log-probs differ by {worst}"
    return worst


def check_export(folder: Path, grid: RankGrid, dtype: Any) -> None:
    """Hugging Face -> Megatron -> Hugging Face, bit for bit; and the plan says what came."""
    actor = Actor.build(folder, dtype=dtype, grid=grid, optimizer=None)
    plan = [(info.name, info.shape, info.dtype) for info in actor.tensor_plan()]
    stream = [(name, tensor.clone()) for name, tensor in actor.hf_tensors()]
    assert plan == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in stream]
    with SafetensorsFolder(folder) as source:
        assert source.names == {name for name, _ in stream}, source.names ^ {name for name, _ in stream}
        for name, tensor in stream:
            assert torch.equal(tensor.cpu(), source.read(name, tuple(tensor.shape), None, 0, 0)), name


def check_training(folder: Path, grid: RankGrid, distributed: bool, micro_batch_tokens: int) -> None:
    """Loss, metrics, gradient norm of every step and all weights at the end against plain PyTorch."""
    samples = make_samples(8, seed=3)
    whole = split_by_tokens(samples, micro_batch_tokens=10**6, pad_id=0, pad_multiple=grid.pad_multiple)[0]
    reports, weights = reference_steps(folder, whole)
    section = OPTIMIZER.model_copy(update={"distributed": distributed})
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=section, total_steps=STEPS)
    # unequal shares, so that an average over data ranks would show
    share = samples if grid.dp_size == 1 else (samples[:2], samples[2:])[grid.dp_rank]
    batches = split_by_tokens(share, micro_batch_tokens=micro_batch_tokens, pad_id=0, pad_multiple=grid.pad_multiple)
    batches.append(idle_like(batches[0], grid.pad_multiple))
    for step, report in enumerate(reports):
        result = actor.train_step(batches, loss_fn, whole.num_trained_tokens)
        assert not result.skipped
        close(result.grad_norm, report.pop("norm"), f"step {step} gradient norm")
        close(result.lr, report.pop("lr"), f"step {step} lr")
        assert result.metrics.keys() == report.keys()
        for name, wanted in report.items():
            close(result.metrics[name], wanted, f"step {step} {name}")
    for name, tensor in actor.hf_tensors():
        error = (tensor - weights[name]).norm() / weights[name].norm()
        assert error < 1e-5, f"{name} differs by {error}"


def check_skip(folder: Path, grid: RankGrid) -> None:
    """A gradient that is not finite changes nothing, on any rank."""
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    before = [p.detach().clone() for p in actor.chunks[0].parameters()]
    batches = split_by_tokens(make_samples(2), micro_batch_tokens=999, pad_id=0, pad_multiple=grid.pad_multiple)

    def poisoned(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        factor = float("nan") if grid.dp_rank == grid.dp_size - 1 else 1.0
        return LossSum(loss=(logprobs * batch.mask).sum() * factor, metrics={})

    lr = actor.lr
    result = actor.train_step(batches, poisoned, 10)
    assert result.skipped
    assert actor.lr == lr
    assert all(torch.equal(a, b) for a, b in zip(before, actor.chunks[0].parameters(), strict=True))
    assert not actor.train_step(batches, loss_fn, 10).skipped


def check_bf16(folder: Path, grid: RankGrid) -> None:
    """bf16 trains through fp32 master weights, and its log-probs stay near those of fp32."""
    batches = split_by_tokens(make_samples(4), micro_batch_tokens=999, pad_id=0, pad_multiple=grid.pad_multiple)
    exact = Actor.build(folder, dtype="float32", grid=grid, optimizer=None).logprobs(batches)[0][0]
    actor = Actor.build(folder, dtype="bfloat16", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    rounded = actor.logprobs(batches)[0][0]
    assert rounded.dtype == torch.float32
    assert ((rounded - exact) * batches[0].mask).abs().mean() < 0.05
    losses = [
        actor.train_step(batches, lambda lp, b: LossSum(-(lp * b.mask).sum(), {}), 40.0).metrics["loss"]
        for _ in range(3)
    ]
    assert losses[2] < losses[0], losses


def main() -> None:
    work, tensor, data = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sequence_parallel, distributed = sys.argv[4] == "1", sys.argv[5] == "1"
    section = ParallelSection(
        tensor=tensor, data=data, sequence_parallel=sequence_parallel, device="cpu", collective_timeout_s=60
    )
    grid = init_grid(section, seed=1)
    for kind in ("llama", "llama3", "mistral", "qwen2", "qwen3"):
        print(kind, "log-probs differ by", check_statistics(work / kind, grid))
    for kind in ("llama", "qwen2", "qwen3"):
        check_export(work / kind, grid, "float32")
        check_export(work / f"{kind}-bf16", grid, "bfloat16")
    for kind, micro_batch_tokens in (("llama", 24), ("qwen2", 96), ("qwen3", 10**6)):
        check_training(work / kind, grid, distributed, micro_batch_tokens)
    check_skip(work / "llama", grid)
    check_bf16(work / "qwen3", grid)
    assert agree(grid, "no" if grid.rank == grid.world_size - 1 else None) == [f"rank {grid.world_size - 1}: no"]
    barrier(grid)
    close_grid()


if __name__ == "__main__":
    main()
