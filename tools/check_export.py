"""Proves an export: plain transformers must generate, greedily, the ids that the engine did under the final weights.

python tools/check_export.py --hf runs/demo/hf --probe runs/demo/engine_probe/rl.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from collab_megatron.errors import RunError, UserError, run_cli


def check(hf_folder: Path, probe_file: Path) -> int:
    """Compare all rows of the probe; their number. Raises RunError at the first difference."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    if not probe_file.exists():
        raise UserError(f"no {probe_file}: train_rl writes it when a run ends")
    probe = json.loads(probe_file.read_text())
    model = AutoModelForCausalLM.from_pretrained(hf_folder).eval()
    for number, row in enumerate(probe["rows"]):
        prompt = torch.tensor([row["input_ids"]])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=probe["max_new_tokens"],
            do_sample=False,
            eos_token_id=probe["stop_token_ids"],
            pad_token_id=probe["stop_token_ids"][0],
        )
        ids = output[0, prompt.shape[1] :].tolist()
        if ids != row["output_ids"]:
            raise RunError(f"{hf_folder} answers prompt {number} with {ids}, the engine with {row['output_ids']}")
    return len(probe["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, type=Path)
    parser.add_argument("--probe", required=True, type=Path)
    args = parser.parse_args()
    rows = check(args.hf, args.probe)
    print(f"{args.hf}: transformers and the engine generate the same ids for all {rows} prompts")


if __name__ == "__main__":
    run_cli(main)
