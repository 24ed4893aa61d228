"""Check an export: plain transformers must agree with the engine's greedy answers under the final weights.

    python tools/check_export.py --hf runs/demo/hf --probe runs/demo/engine_probe/rl.json

transformers gets each answer teacher-forced, in the run's dtype. Two conditions must hold:

- its log-probs of the engine's tokens equal those of the engine, in the mean over each answer;
- each token is its most likely one, or below that by no more than rounding (a tie). After a tie both continue with the
  engine's token, so a tie does not affect later tokens.

Tolerances. Both sides have the same weights and differ only in the order of their sums.
float32: rounding of 6e-8 grows to 4e-6 in the log-probs (measured at 135M, CPU); the tolerance leaves room for TF32.
bfloat16: numbers have 8 bits, so logits of 16 to 32 are 0.125 apart. Two correct implementations were seen to differ by
two such steps (0.25), and by 0.03 to 0.05 in a token's log-prob on average. The tolerance is twice that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collab_megatron.errors import RunError, UserError, run_cli

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """In nats."""

    logprob: float  # mean |transformers - engine| over an answer
    tie: float  # the most that the engine's token may be below the most likely one


TOLERANCES = {"float32": Tolerance(1e-3, 5e-3), "bfloat16": Tolerance(0.1, 0.5)}


@dataclass(frozen=True)
class Agreement:
    """The figures of a successful check."""

    prompts: int
    tokens: int
    ties: int  # tokens that transformers would have chosen differently
    largest_gap: float  # of the answers' mean log-prob differences


def compare(number: int, logits: Tensor, row: dict[str, Any], tolerance: Tolerance) -> tuple[int, float]:
    """logits [tokens, V], those that predict the engine's tokens -> (ties, mean log-prob gap).

    Raises RunError naming prompt, token and gap where they differ by more than `tolerance`.
    """
    import torch

    ids = torch.tensor(row["output_ids"])[:, None]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best, choice = logprobs.max(dim=-1)
    own = logprobs.gather(1, ids)[:, 0]
    below = best - own
    worst = int(below.argmax())
    if not float(below[worst]) <= tolerance.tie:  # also for NaN
        raise RunError(
            f"the export differs from the engine in prompt {number} at token {worst}: {int(choice[worst])} instead of "
            f"{int(ids[worst])}, which is {float(below[worst]):.3g} nats less likely (a tie is at most "
            f"{tolerance.tie:g})"
        )
    gap = float((own - torch.tensor(row["logprobs"])).abs().mean())
    if not gap <= tolerance.logprob:
        raise RunError(
            f"the export's log-probs of prompt {number} differ from the engine's by {gap:.3g} nats on average "
            f"(rounding is at most {tolerance.logprob:g})"
        )
    return int((choice != ids[:, 0]).sum()), gap


def check(hf_folder: Path, probe_file: Path) -> Agreement:
    """Compare all answers of the probe. Raises RunError for the first that differs, UserError for a bad probe."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    probe = read_probe(probe_file)
    if not (hf_folder / "config.json").is_file():
        raise UserError(f"--hf {hf_folder} is not a model folder: name the run's exported folder")
    dtype = getattr(torch, probe["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=dtype).eval()
    found: list[tuple[int, float]] = []
    for number, row in enumerate(probe["rows"]):
        before, ids = len(row["input_ids"]), [*row["input_ids"], *row["output_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, before - 1 : -1]
        found.append(compare(number, logits, row, TOLERANCES[probe["dtype"]]))
    return Agreement(
        prompts=len(found),
        tokens=sum(len(row["output_ids"]) for row in probe["rows"]),
        ties=sum(ties for ties, _ in found),
        largest_gap=max(gap for _, gap in found),
    )


def read_probe(file: Path) -> dict[str, Any]:
    """The probe. Raises UserError if there is none, or if it has no log-probs."""
    if not file.exists():
        raise UserError(f"there is no {file}: train_rl writes it at the end of a run")
    try:
        probe: dict[str, Any] = json.loads(file.read_text("utf-8"))
        rows: Sequence[dict[str, Any]] = probe["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a probe of a run ({error}): train_rl writes it at the end of a run") from None
    if probe.get("dtype") not in TOLERANCES or not rows or any("logprobs" not in row for row in rows):
        raise UserError(f"{file} has no log-probs, because an older version wrote it: run one more step of the run")
    return probe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/check_export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, type=Path)
    parser.add_argument("--probe", required=True, type=Path)
    args = parser.parse_args()
    agreed = check(args.hf, args.probe)
    print(
        f"{args.hf}: transformers and the engine agree on all {agreed.prompts} prompts ({agreed.tokens} tokens, "
        f"{agreed.ties} of them ties, log-probs at most {agreed.largest_gap:.2g} nats apart on average)"
    )


if __name__ == "__main__":
    run_cli(main)
