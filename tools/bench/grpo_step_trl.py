"""TRL's side of tools/bench/grpo_step.py: runs in TRL's own environment, which has no collab_megatron.

    python tools/bench/grpo_step_trl.py SETTINGS.json SECONDS.json

Settings: model, prompts (texts), num_replies, reply_tokens, batch (replies of one backward pass), steps, lr, kl_coef,
threads. Writes the wall seconds of every step but the first.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from grpo_step_reward import reward_of  # type: ignore[import-not-found]  # its folder is the script's


def run(settings: dict[str, Any], scratch: Path) -> list[float]:
    """Seconds of the steps, from the end of one to the end of the next."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]  # in this environment only

    disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    replies = settings["prompts_per_step"] * settings["num_replies"]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in settings["prompts"]]
    config = GRPOConfig(
        output_dir=str(scratch),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=replies // settings["batch"],
        num_generations=settings["num_replies"],
        max_completion_length=settings["reply_tokens"],
        generation_kwargs={"min_new_tokens": settings["reply_tokens"]},
        max_steps=settings["steps"],
        learning_rate=settings["lr"],
        beta=settings["kl_coef"],
        gradient_checkpointing=False,
        temperature=1.0,
        seed=1,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=lambda completions, **_: [reward_of(turns[-1]["content"]) for turns in completions],
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    return [after - before for before, after in itertools.pairwise(ends)]


if __name__ == "__main__":
    seconds = run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).parent / "trl_scratch")
    Path(sys.argv[2]).write_text(json.dumps(seconds))
