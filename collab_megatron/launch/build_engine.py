"""The SGLang servers of a dataset build: they serve `model` as the assistant, over the API that every LLM here has.

Unlike the servers of a run they have a tokenizer and render the chat template themselves, so that journal, budget and
retries are those of any other assistant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from collab_megatron.config import BuildDatasetConfig
from collab_megatron.config.sections import DeploymentSection
from collab_megatron.launch.attempts import begin_attempt
from collab_megatron.launch.lock import RunLock
from collab_megatron.launch.run_processes import launch_engine_only
from collab_megatron.launch.site import child_env
from collab_megatron.launch.supervisor import Supervisor

KEY_VARIABLE = "COLLAB_MEGATRON_BUILD_KEY"
"""Environment variable of the worker processes with the servers' API key."""


@contextmanager
def with_assistant(config: BuildDatasetConfig, lock: RunLock) -> Iterator[BuildDatasetConfig]:
    """The config whose assistant is `model` on servers that end with the block; unchanged without `model`.

    Waits until every server answers. Raises RunError if one dies or is late.
    """
    if config.model is None:
        yield config
        return
    logs = begin_attempt(config.run.logs_dir).folder
    with Supervisor(logs, held=lock.held, env=child_env(config)) as supervisor:
        urls, keys = launch_engine_only(supervisor, config)
        if keys is not None:
            os.environ[KEY_VARIABLE] = keys.api
        try:
            yield served_assistant(config, urls, KEY_VARIABLE if keys is not None else None)
        finally:
            os.environ.pop(KEY_VARIABLE, None)


def served_assistant(config: BuildDatasetConfig, urls: Sequence[str], key_env: str | None) -> BuildDatasetConfig:
    """The config with `urls` as deployments of its assistant."""
    assistant = config.simulators.assistant
    assert assistant is not None, "the config's own check"
    bases = [f"{url.rstrip('/')}/v1" for url in urls]
    others = tuple(
        DeploymentSection(
            model=assistant.model,
            api_base=base,
            api_key_env=key_env,
            input_usd_per_mtoken=assistant.input_usd_per_mtoken,
            output_usd_per_mtoken=assistant.output_usd_per_mtoken,
        )
        for base in bases[1:]
    )
    served = assistant.model_copy(update={"api_base": bases[0], "api_key_env": key_env, "deployments": others})
    simulators = config.simulators.model_copy(update={"assistant": served})
    return config.model_copy(update={"simulators": simulators})
