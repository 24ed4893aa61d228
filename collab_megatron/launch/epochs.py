"""train.epochs converted to train.steps: the launcher counts the usable rows, so no other process handles epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from collab_megatron.config import DPOConfig, RLConfig, SupervisedConfig
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.pair_tokens import read_pair_rows
from collab_megatron.data.parquet import read_task_files
from collab_megatron.data.sft_tokens import UsableRows, read_sft_rows
from collab_megatron.data.token_limit import fitting_tasks, max_context_tokens
from collab_megatron.errors import UserError
from collab_megatron.model.folder import read_hf_config, resolve_model_folder
from collab_megatron.rollout.replay import open_replay

C = TypeVar("C", bound=RLConfig | SupervisedConfig)


def epochs_to_steps(config: C) -> C:
    """The config with train.steps in place of train.epochs, which a printed line reports; unchanged without epochs,
    but a replay of a record does not go past its end unasked.

    The last step may reach into one more epoch. Raises UserError for a model, file or schedule that does not fit.
    """
    epochs = config.train.epochs
    replays = isinstance(config, RLConfig) and config.replay is not None
    if epochs is None and not replays:
        return config
    rows, per_step, what = _sizes(config)
    if epochs is None:
        if config.train.steps > rows:
            raise UserError(
                f"train.steps={config.train.steps} is more than the {rows} recorded steps of replay.record: set "
                f"train.steps={rows}, or train.epochs for several passes with train.steps=null"
            )
        return config
    steps = max(1, math.ceil(epochs * rows / per_step))
    print(f"train.epochs={epochs:g}: {rows:,} usable {what} in steps of {per_step} make {steps:,} steps", flush=True)
    update = {**config.train.model_dump(), "steps": steps, "epochs": None}
    return _checked(config, update)


def _sizes(config: RLConfig | SupervisedConfig) -> tuple[int, int, str]:
    """Usable rows, rows of a step, and what they are."""
    if isinstance(config, RLConfig) and config.replay is not None:
        return open_replay(config).num_steps(), 1, "recorded steps"
    if isinstance(config, RLConfig):
        return _usable_prompts(config), config.rollout.prompts_per_step, "prompts"
    what = "pairs" if isinstance(config, DPOConfig) else "conversations"
    return _usable_rows(config), config.batch_size, what


def _checked(config: C, train: Mapping[str, Any]) -> C:
    """The config with another `train` section, validated again: the schedule depends on the number of steps."""
    try:
        return cast("C", type(config).model_validate({**config.model_dump(), "train": train}))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        sentence = reason["ctx"]["error"] if "ctx" in reason else reason["msg"]
        raise UserError(f"with the {train['steps']} steps of train.epochs: {sentence}") from None


def _usable_prompts(config: RLConfig) -> int:
    folder = resolve_model_folder(config.model.path, weights=False)
    fit = fitting_tasks(
        read_task_files(config.data.train_files)[0],
        ChatTemplate(load_tokenizer(folder)),
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_context_tokens=max_context_tokens(read_hf_config(folder), config.engine),
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return len(fit.kept)


def _usable_rows(config: SupervisedConfig) -> int:
    chat = ChatTemplate(load_tokenizer(resolve_model_folder(config.model.path, weights=False)))
    return len(supervised_rows(config, config.data.train_files, chat).kept)


def supervised_rows(config: SupervisedConfig, files: Sequence[Path], chat: ChatTemplate) -> UsableRows[Any]:
    """The rows of train_sft or train_dpo that can be used. Raises UserError as read_sft_rows and read_pair_rows."""
    if isinstance(config, DPOConfig):
        return read_pair_rows(files, chat, config.max_tokens)
    return read_sft_rows(files, chat, config.max_tokens)
