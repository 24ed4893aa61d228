"""What the engine answers greedily under the final weights, written down: an export must generate the same ids."""

from __future__ import annotations

import json

from collab_megatron.config import RLConfig
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.engine.control import EngineControl
from collab_megatron.files import publish_text
from collab_megatron.types import RolloutBatch

NUM_PROMPTS = 16


def write_engine_probe(config: RLConfig, engine: EngineControl, batch: RolloutBatch) -> None:
    """Greedy replies to prompts of the last batch: {"weight_version", "stop_token_ids", "max_new_tokens", "rows"}."""
    stop = list(ChatTemplate(load_tokenizer(config.model.path)).end_ids)
    max_new_tokens = config.rollout.max_new_tokens
    prompts = sorted({sample.prompt_ids for sample in batch.samples})[:NUM_PROMPTS]
    rows = [
        {
            "input_ids": prompt,
            "output_ids": engine.generate(prompt, max_new_tokens=max_new_tokens, stop_token_ids=stop),
        }
        for prompt in prompts
    ]
    probe = {"weight_version": engine.weight_version(), "stop_token_ids": stop, "max_new_tokens": max_new_tokens}
    publish_text(config.run.engine_probe_file, json.dumps({**probe, "rows": rows}))
