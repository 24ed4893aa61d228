"""Lineage: a hash of everything that decides a run's weights and conversations.

The journal returns turns and batches only to the lineage that wrote them. The hash covers:

- contents, never paths: the training files, the files of the model and of run.init_from, the prompts (shipped ones
  too), the metric modules
- the whole config, except for the settings listed below, which set where and how fast the run works. A new setting
  counts until it is listed
- the version of this package

Cost: training files are read in full, in chunks, on several threads. One thread hashes 0.5 GB/s or more; the driver
then parses the same files, which takes much longer. Weight files count by size, header and evenly spaced samples, which
differ in every retrained model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collab_megatron import __version__
from collab_megatron.config.entry import EvaluateConfig, RLConfig
from collab_megatron.errors import UserError
from collab_megatron.files import contents, short_hash
from collab_megatron.model.folder import resolve_model_folder
from collab_megatron.rollout.llm.templates import prompts_by_content, shipped_prompts
from collab_megatron.rollout.rewards.modules import module_sources
from collab_megatron.wire.checkpoints import named_checkpoint

SAMPLES = 64  # of a weight file, evenly spaced
SAMPLE_BYTES = 4096
WEIGHTS = (".safetensors", ".bin", ".pt")
TEXTS = (".json", ".jinja", ".txt", ".model")  # config, index, tokenizer, chat template

# sections about where, when and how fast, or about output only
APART = ("engine", "sync", "journal", "budget", "parallel", "train", "record", "output", "profile", "replay")
FREE: Mapping[str, frozenset[str]] = {
    "run": frozenset({"dir", "name", "resume", "init_from", "umask", "stopped_timeout_s"}),  # init_from by content
    "model": frozenset({"path"}),  # by content
    "data": frozenset({"train", "validation"}),  # by content; held-out rows do not change the training
    "reward": frozenset({"metric_modules", "second_judge", "second_judge_share"}),  # by content; does not reward
    "algorithm": frozenset({"preset"}),  # its pieces count
    "optimizer": frozenset({"distributed", "overlap", "cpu_offload"}),
    "simulators": frozenset({"health", "assistant"}),  # limits of the health check; the data engine's LLM
    "driver": frozenset(
        {"shards", "future_timeout_s", "group_timeout_s", "max_restarts", "max_unexpected_errors", "live_port"}
    ),
}
# of every LLM: how to reach it. Model, temperature, lengths and prompts count
LLM_FREE = frozenset(
    {
        *("api_base", "api_key_env", "deployments", "timeout_s", "deadline_s", "max_attempts", "max_concurrency"),
        *("requests_per_minute", "tokens_per_minute", "cooldown_s", "input_usd_per_mtoken", "output_usd_per_mtoken"),
    }
)


def lineage_of(config: RLConfig | EvaluateConfig) -> str:
    """The lineage of a run. Raises UserError for a model or a file that cannot be read."""
    raw = prompts_by_content(config.model_dump(mode="json"))
    decides = {section: _less(values, FREE.get(section)) for section, values in raw.items() if section not in APART}
    decides["simulators"] = _llm(decides["simulators"])
    decides["reward"]["judges"] = _llm(decides["reward"].get("judges", {}))
    decides["engine"] = {key: raw["engine"][key] for key in ("context_length", "extra_args")}
    if isinstance(config, RLConfig):
        decides.pop("evaluation")  # its conversations are not trained on
        constant = config.optimizer.schedule == "constant"
        decides["schedule"] = None if constant else [config.train.steps, raw["train"].get("epochs")]
        decides["init_from"] = _checkpoint_fingerprint(config.run.init_from)
        decides["data files"] = [contents(file) for file in config.data.train_files]
    decides["model files"] = model_fingerprint(resolve_model_folder(config.model.path))
    decides["shipped prompts"] = [contents(file) for file in shipped_prompts()]
    decides["modules"] = [
        contents(source) for module in config.reward.metric_modules for source in module_sources(module)
    ]
    decides["version"] = __version__
    return short_hash(json.dumps(decides, sort_keys=True).encode())


def model_fingerprint(folder: Path) -> dict[str, str]:
    """The files of a model folder by name: small ones by content, weights by size, header and samples."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    texts = {path.name: contents(path) for path in files if path.suffix in TEXTS}
    return texts | {path.name: _sampled(path) for path in files if path.suffix in WEIGHTS}


def _checkpoint_fingerprint(path: Path | None) -> Any:
    """The weight files of the checkpoint at `path`. The path itself if the checkpoint is gone, as a resume allows."""
    if path is None:
        return None
    try:
        folder = named_checkpoint(path).model_folder
    except UserError:
        return str(path)
    return {file.name: _sampled(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _sampled(file: Path) -> str:
    """A safetensors file begins with its header's length (8 bytes, little-endian) and its header."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = opened.read(8)
            header = opened.read(min(int.from_bytes(length, "little"), size) if file.suffix == ".safetensors" else 0)
            digest = hashlib.sha256(b"%d " % size + length + header)
            for number in range(SAMPLES):
                opened.seek(max(0, (size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
                digest.update(opened.read(SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def _less(values: Any, free: frozenset[str] | None) -> Any:
    return {key: value for key, value in values.items() if key not in free} if free else values


def _llm(node: Any) -> Any:
    """`node` without the settings in LLM_FREE."""
    if isinstance(node, Mapping):
        return {key: _llm(value) for key, value in node.items() if key not in LLM_FREE}
    return [_llm(value) for value in node] if isinstance(node, list) else node
