"""SFT and DPO steps in plain PyTorch and transformers, in fp64, a reply at a time: what every layout must reproduce."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from collab_megatron.data.pair_tokens import TokenPair
from collab_megatron.data.sft_tokens import TokenRow
from tests.trainer.parallel.plain import LEARNING_RATES, OPTIMIZER

BETA = 0.5
VOCABULARY = 250


def _rows() -> list[TokenRow]:
    """Conversations of two trained turns, ragged."""
    rng, rows = random.Random(11), []
    for _ in range(7):
        mask: list[bool] = []
        for trained in (False, True, False, True):
            mask += [trained] * rng.randint(2, 7)
        rows.append(TokenRow([rng.randrange(VOCABULARY) for _ in mask], mask))
    return rows


def _pairs() -> list[TokenPair]:
    """Ragged; two pairs have one prompt."""
    rng, pairs = random.Random(12), list[TokenPair]()
    prompt = [1]
    for number in range(6):
        if number != 4:
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 12))]
        replies = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 10))] for _ in range(2)]
        chosen, rejected = (TokenRow([*prompt, *r], [False] * len(prompt) + [True] * len(r)) for r in replies)
        pairs.append(TokenPair(chosen, rejected, len(prompt)))
    return pairs


ROWS, PAIRS = _rows(), _pairs()


def log_p(model: Any, row: TokenRow) -> Tensor:
    """Sum of the log-probs of the trained tokens."""
    logits = model(torch.tensor([row.ids])).logits[0].double()
    taken = torch.log_softmax(logits[:-1], dim=-1).gather(-1, torch.tensor(row.ids[1:])[:, None])[:, 0]
    return taken[torch.tensor(row.mask[1:])].sum()


def sft(model: Any, reference: Any) -> tuple[Tensor, dict[str, float]]:
    tokens = sum(sum(row.mask) for row in ROWS)
    loss = -torch.stack([log_p(model, row) for row in ROWS]).sum() / tokens
    return loss, {"nll": loss.item()}


def dpo(model: Any, reference: Any) -> tuple[Tensor, dict[str, float]]:
    losses, margins, chosen_logprobs = [], [], []
    for pair in PAIRS:
        with torch.no_grad():
            ref_chosen, ref_rejected = log_p(reference, pair.chosen), log_p(reference, pair.rejected)
        chosen = log_p(model, pair.chosen)
        margin = BETA * ((chosen - ref_chosen) - (log_p(model, pair.rejected) - ref_rejected))
        losses.append(F.softplus(-margin))  # -log sigmoid
        margins.append(margin.item())
        chosen_logprobs.append(chosen.item())
    figures = {
        "reward_margin": sum(margins) / len(margins),
        "chosen_logprob": sum(chosen_logprobs) / len(chosen_logprobs),
    }
    return torch.stack(losses).mean(), figures


Objective = Callable[[Any, Any], tuple[Tensor, dict[str, float]]]
OBJECTIVES: dict[str, Objective] = {"sft": sft, "dpo": dpo}


def write_reference(folder: Path) -> None:
    """folder/NAME.pt: a report of each step; the model after them in folder/NAME."""
    for name, objective in OBJECTIVES.items():
        model, reference = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
            for _ in range(2)
        )
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
                {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ],
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
        )
        reports = [_step(model, reference, objective, optimizer, lr) for lr in LEARNING_RATES]
        torch.save(reports, folder / f"{name}.pt")
        model.float().save_pretrained(folder / name)


def _step(
    model: Any, reference: Any, objective: Objective, optimizer: torch.optim.Optimizer, lr: float
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, figures = objective(model, reference)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad).item()
    optimizer.step()
    return {**figures, "loss": loss.item(), "norm": norm, "lr": lr}


def trained_tokens(rows: Sequence[TokenRow]) -> int:
    return sum(sum(row.mask[1:]) for row in rows)
