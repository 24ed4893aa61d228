"""The policy step in plain PyTorch and transformers, one process: what every layout must reproduce.

Written down once per model and loss (a .pt file, and a folder with the weights after the last step); every rank reads
it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from collab_megatron.config.sections import AlgorithmSection, OptimizerSection
from collab_megatron.trainer.batching.micro_batch import MicroBatch, TokenSample, collate
from collab_megatron.trainer.loss.policy_step import make_policy_loss, with_values
from collab_megatron.trainer.loss.sequences import mean_weights
from tests.trainer.parallel.tiny import make_samples

OPTIMIZER = OptimizerSection(
    lr=1e-3, schedule="linear", warmup_steps=1, min_lr=1e-4, weight_decay=0.1, clip_grad=0.05, beta2=0.95
)
STEPS = 3
LEARNING_RATES = (1e-3, 1e-3, 1e-4 + 0.5 * 9e-4)  # one step of warm-up, which has the full rate; then linear decay


def _with_prompt_of(leader: TokenSample, sample: TokenSample) -> TokenSample:
    """The reply of `sample` behind the prompt of `leader`; they can share that prompt in a row."""
    prompt, reply = leader.mask.index(1.0), int(sum(sample.mask))
    return TokenSample(
        ids=[*leader.ids[:prompt], *sample.ids[-reply:]],
        mask=[0.0] * prompt + [1.0] * reply,
        values={name: [0.0] * prompt + list(values[-reply:]) for name, values in sample.values.items()},
        shareable=prompt - 1,
    )


def _samples() -> list[TokenSample]:
    """Ragged; 0 and 1 have one prompt, and so have 3 to 6, of which 3 and 4 are of one length."""
    made = make_samples(8, seed=3)
    leader = {0: 0, 1: 0, 3: 5, 4: 5, 5: 5, 6: 5}
    made[4] = made[3]
    return [_with_prompt_of(made[leader[i]], sample) if i in leader else sample for i, sample in enumerate(made)]


SAMPLES = _samples()


# by name: the loss of tokens, and one with every reduction over replies and the entropy's gradient
ALGORITHMS = {
    "grpo": AlgorithmSection(kl_coef=0.01),
    "sequence": AlgorithmSection(
        preset="gspo", clip_low=0.9, clip_high=2.0, kl_coef=0.01, importance="sequence", entropy_coef=0.1
    ),
}


loss_fn = make_policy_loss(ALGORITHMS["grpo"])


def samples_for(algorithm: AlgorithmSection) -> list[TokenSample]:
    """SAMPLES, for a loss of whole replies with the weights of its mean, and with an engine that is near the policy at
    the start of the step: the product over a reply would be at a limit in every one."""
    if algorithm.importance != "sequence":
        return SAMPLES
    weights = mean_weights([int(sum(s.mask)) for s in SAMPLES], algorithm.aggregation, longest=1)
    found = []
    for sample, weight in zip(SAMPLES, weights, strict=True):
        pairs = zip(sample.values["old_logprobs"], sample.values["rollout_logprobs"], strict=True)
        near = [old + (rollout - old) / 20 for old, rollout in pairs]
        values = {"weights": [weight * trained for trained in sample.mask], "rollout_logprobs": near}
        found.append(replace(sample, values={**sample.values, **values}))
    return found


def numbered(batch: MicroBatch, algorithm: AlgorithmSection) -> MicroBatch:
    """The batch as rl_step gives it to the loss."""
    return with_values(batch, "sequence", batch.numbered()) if algorithm.reduces_over_replies else batch


def statistics(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, S] -> log-probabilities and entropies [B, S], zero at 0."""
    logits = torch.log_softmax(model(ids).logits[:, :-1].float(), dim=-1)
    logprobs = logits.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)
    return F.pad(logprobs, (1, 0)), F.pad(entropy, (1, 0))


def load_plain(folder: Path) -> Any:
    # eager: SDPA of transformers hides the whole row of a padded position under a sliding window
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def write_reference(folder: Path, name: str = "grpo") -> None:
    """folder/NAME.pt: {"reports": one dict a step, "logprobs", "entropies", "after": [T] per sample}; and the trained
    model in folder/trained-NAME. name: of ALGORITHMS.
    """
    algorithm = ALGORITHMS[name]
    samples = samples_for(algorithm)
    batch = collate(samples, tuple(range(len(samples))), pad_id=0, pad_multiple=1, packed=False)
    batch = numbered(batch, algorithm)
    model = load_plain(folder)
    with torch.no_grad():
        before = [batch.per_sample(values) for values in statistics(model, batch.ids)]
    reports = [_step(model, batch, lr, optimizer, algorithm) for lr, optimizer in _schedule(model)]
    with torch.no_grad():
        after = batch.per_sample(statistics(model, batch.ids)[0])
    found = {"reports": reports, "logprobs": before[0], "entropies": before[1], "after": after}
    torch.save(found, folder / f"{name}.pt")
    model.save_pretrained(folder / f"trained-{name}")


def _schedule(model: Any) -> list[tuple[float, torch.optim.Optimizer]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    return [(lr, optimizer) for lr in LEARNING_RATES]


def _step(
    model: Any, batch: MicroBatch, lr: float, optimizer: torch.optim.Optimizer, algorithm: AlgorithmSection
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = lr
    logprobs, entropy = statistics(model, batch.ids)
    result = make_policy_loss(algorithm)(logprobs, with_values(batch, "entropy", entropy))
    tokens = batch.num_trained_tokens
    optimizer.zero_grad()
    (result.loss / tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    for parameter in model.parameters():
        parameter.grad.mul_(min(1.0, OPTIMIZER.clip_grad / (norm + 1e-6)))
    optimizer.step()
    report = {name: value.item() / tokens for name, value in result.metrics.items()}
    report |= {name: value.item() for name, value in result.largest.items()}
    entropy_sum = (entropy.detach() * batch.mask).sum().item()
    return {**report, "loss": result.loss.item() / tokens, "entropy": entropy_sum / tokens, "norm": norm, "lr": lr}
