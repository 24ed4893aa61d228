"""Evaluates a fixed model on whole held-out conversations.

    python -m collab_megatron.evaluate conf/demo_evaluate.yaml [section.key=value ...] [--dry-run]
    python -m collab_megatron.evaluate conf/demo_rl.yaml model.path=runs/demo/checkpoints/rl     the newest checkpoint

Starts an engine for `model.path` (or uses `engine.urls`), plays conversations at `evaluation.temperature`, prints the
figures, and writes them to `output` as JSON, with all conversations next to it as JSON lines. The config of an RL run
works too, and so does a run's checkpoint, which is converted once. Samples and paid replies are kept in a journal per
set of weights, so an interrupted evaluation continues without sampling or paying again. A spent budget ends it with
exit code 3 and the figures of the finished conversations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvloop

from collab_megatron import __version__
from collab_megatron.config import EvaluateConfig, load_config, show_config
from collab_megatron.data.parquet import read_task_files
from collab_megatron.engine.control import served_weights
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import BudgetSpent, EvaluationFailed, run_cli
from collab_megatron.figures import values
from collab_megatron.files import keep_from_others, publish_json
from collab_megatron.launch.cli import parse_arguments
from collab_megatron.launch.conversion import checkpoint_of, hf_folder_of
from collab_megatron.launch.lock import run_lock
from collab_megatron.launch.preflight import check_evaluate
from collab_megatron.launch.run_processes import child_env, launch_engine_only, on_chosen_device
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.log import set_up_logging
from collab_megatron.model.folder import resolve_model_folder
from collab_megatron.rollout.clients import open_clients, usable_tasks
from collab_megatron.rollout.evaluation import Evaluation, evaluate, evaluation_calls
from collab_megatron.rollout.journal.store import Journal, open_journal
from collab_megatron.rollout.lineage import model_fingerprint
from collab_megatron.rollout.rewards import judge_calls
from collab_megatron.rollout.transcripts import write_transcripts
from collab_megatron.trainer.report.evaluation_table import evaluation_table
from collab_megatron.wire.checkpoints import read_info
from collab_megatron.wire.protocol import LOST_CONVERSATIONS, require_most

NAME = "evaluate"


@dataclass(frozen=True)
class Result:
    """The result of an evaluation."""

    played: Evaluation
    figures: dict[str, float]  # of conversations, API calls and journal


async def play(
    config: EvaluateConfig,
    engine_urls: Sequence[str],
    max_context_tokens: int,
    journal: Journal | None = None,
    engine_keys: EngineKeys | None = None,
) -> Result:
    """Play the held-out conversations; the figures include those of the API calls."""
    async with open_clients(
        config,
        engine_urls=engine_urls,
        max_context_tokens=max_context_tokens,
        journal=journal,
        engine_keys=engine_keys,
    ) as clients:
        tasks, _ = read_task_files(config.data.validation_files)
        budget = clients.gateway.budget
        calls = evaluation_calls(config.evaluation, judge_calls(config.reward, config.simulators))
        played = await evaluate(
            usable_tasks(tasks, clients, config.rollout.max_prompt_tokens),
            evaluation=config.evaluation,
            weights=config.reward.metric_weights,
            clamps=config.reward.metric_clamps,
            limits=clients.limits,
            players=clients.players,
            within=partial(budget.room, calls),
        )
        for warning in budget.warnings():
            print(warning, flush=True)
        figures = values(played.figures) | clients.gateway.snapshot().metrics() | budget.metrics()
        return Result(played, figures | {"engine/turns_replayed": float(clients.engine.replayed)})


def own_name(config: EvaluateConfig) -> EvaluateConfig:
    """The config with the evaluation's own run name: the name in an RL config belongs to the logs of a training run."""
    if config.run.name.startswith(NAME):
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{NAME}-{config.run.name}"})})


def with_model(config: EvaluateConfig, folder: Path) -> EvaluateConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


def weights_name(config: EvaluateConfig, urls: Sequence[str]) -> str:
    """16 hex digits that identify the policy by contents, not paths. Other settings of the evaluation do not count, so
    another judge or more tasks reuse the earlier samples. Raises UserError for servers with different weights."""
    decides = {
        "files": model_fingerprint(resolve_model_folder(config.model.path)),
        "served": served_weights(urls, timeout_s=config.engine.startup_timeout_s) if config.engine.urls else None,
        "dtype": config.model.dtype,
        "engine": [config.engine.context_length, *config.engine.extra_args],
        "version": __version__,
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def own_journal(config: EvaluateConfig, weights: str) -> Journal:
    """The journal for these weights, so that a budget cap applies to one evaluation. It lies next to `journal.path` if
    that is set, because that file may belong to a running training. Raises UserError for another kind of file."""
    path = config.journal.path
    folder = config.run.dir / "journal" if path is None else path.parent
    section = config.journal.model_copy(update={"path": None})
    return open_journal(section, folder / f"{config.run.name}-{weights}.sqlite", weights)


def main() -> None:
    arguments = parse_arguments(__doc__)
    set_up_logging("evaluate")
    given = own_name(load_config(EvaluateConfig, arguments.config, arguments.overrides))
    keep_from_others(given.run.umask)
    if arguments.dry_run:
        print(show_config(given), flush=True)
    checkpoint = checkpoint_of(given.model.path)
    # check everything else before the conversion: the checkpoint contains config and tokenizer
    config = given if checkpoint is None else with_model(given, read_info(checkpoint).hf_folder)
    if arguments.dry_run:
        check_evaluate(config, dry_run=True, node=arguments.node)
        return
    with run_lock(config.run) as lock:
        max_context_tokens = check_evaluate(config, node=arguments.node)
        if checkpoint is not None:
            config = with_model(given, hf_folder_of(checkpoint, config.run.dir / "converted", config.run.logs_dir))
        config = on_chosen_device(config)
        output = config.output or config.run.evaluations_dir / f"{Path(config.model.path).name}.json"
        with Supervisor(config.run.logs_dir, held=lock.held, env=child_env(config)) as supervisor:
            urls, keys = launch_engine_only(supervisor, config)
            with closing(own_journal(config, weights_name(config, urls))) as journal:
                result = uvloop.run(play(config, urls, max_context_tokens, journal, keys))
        if result.played.groups or not result.played.stop:  # else keep the figures of an earlier attempt
            report(given.model.path, result, output, list(config.reward.metric_weights))
    if result.played.stop:
        done, wanted = result.played.done, result.played.wanted
        raise BudgetSpent(f"{done} of {wanted} held-out conversations were played: {result.played.stop}")
    require_most([result.played.tally], LOST_CONVERSATIONS, EvaluationFailed)


def report(model: str, result: Result, output: Path, metrics: Sequence[str]) -> None:
    """Write figures and conversations to disk, and print a table."""
    transcripts = output.with_name(output.name.removesuffix(".json") + ".jsonl")  # a model's name may contain a dot
    write_transcripts(transcripts, 0, result.played.groups)
    publish_json(output, dict(sorted(result.figures.items())))
    print(f"\nheld-out conversations with {model}\n")
    for line in evaluation_table(result.figures, metrics):
        print(f"  {line}")
    print(f"\n  figures        {output}\n  conversations  {transcripts}", flush=True)


if __name__ == "__main__":
    run_cli(main)
