"""What the engine answers greedily under the final weights, with its log-probs: an export must agree."""

from __future__ import annotations

import json

from collab_megatron.config import RLConfig
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.engine.control import EngineControl
from collab_megatron.files import publish_text
from collab_megatron.types import RolloutBatch

NUM_PROMPTS = 16


def write_engine_probe(config: RLConfig, engine: EngineControl, batch: RolloutBatch) -> None:
    """Greedy replies to prompts of the last batch: {"weight_version", "dtype", "rows": [{"input_ids", "output_ids",
    "logprobs"}], ...}, log-probs in nats."""
    stop = list(ChatTemplate(load_tokenizer(config.model.path)).end_ids)
    max_new_tokens = config.rollout.max_new_tokens
    prompts = sorted({sample.prompt_ids for sample in batch.samples})[:NUM_PROMPTS]
    rows = []
    for prompt in prompts:
        ids, logprobs = engine.greedy(prompt, max_new_tokens=max_new_tokens, stop_token_ids=stop)
        rows.append({"input_ids": prompt, "output_ids": ids, "logprobs": logprobs})
    probe = {"weight_version": engine.weight_version(), "stop_token_ids": stop, "max_new_tokens": max_new_tokens}
    publish_text(config.run.engine_probe_file, json.dumps({**probe, "dtype": config.model.dtype, "rows": rows}))
