"""Engine probe: greedy replies of an engine with the final weights, with log-probs. An export is compared with it."""

from __future__ import annotations

import json

from collab_megatron.config import RLConfig
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.parquet import read_task_files
from collab_megatron.data.token_limit import first_prompts, max_context_tokens
from collab_megatron.engine.control import EngineControl
from collab_megatron.files import publish_text
from collab_megatron.model.folder import read_hf_config, resolve_model_folder

NUM_PROMPTS = 16


def write_engine_probe(config: RLConfig, engine: EngineControl) -> None:
    """Write greedy replies to the first prompts of the training file as JSON: {"weight_version", "dtype", "rows":
    [{"input_ids", "output_ids", "logprobs"}], ...}, log-probs in nats.

    Every attempt of a run takes the same prompts, so a resume after the last step can still write the probe.
    """
    chat = ChatTemplate(load_tokenizer(config.model.path))
    stop = list(chat.end_ids)
    max_new_tokens = config.rollout.max_new_tokens
    context = max_context_tokens(read_hf_config(resolve_model_folder(config.model.path)), config.engine)
    tasks, _ = read_task_files(config.data.train_files)
    rows = []
    room = min(config.rollout.max_prompt_tokens, context - max_new_tokens)
    for prompt in first_prompts(tasks, chat, NUM_PROMPTS, room=room):
        ids, logprobs = engine.greedy(prompt, max_new_tokens=max_new_tokens, stop_token_ids=stop)
        rows.append({"input_ids": prompt, "output_ids": ids, "logprobs": logprobs})
    probe = {"weight_version": engine.weight_version(), "stop_token_ids": stop, "max_new_tokens": max_new_tokens}
    publish_text(config.run.engine_probe_file, json.dumps({**probe, "dtype": config.model.dtype, "rows": rows}))
