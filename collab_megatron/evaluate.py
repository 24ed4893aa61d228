"""Evaluates models on whole held-out conversations: one, or several side by side.

    python -m collab_megatron.evaluate conf/demo_evaluate.yaml [section.key=value ...] [--dry-run]
    python -m collab_megatron.evaluate conf/demo_rl.yaml model.path=runs/demo/checkpoints/rl     the newest checkpoint
    python -m collab_megatron.evaluate conf/demo_evaluate_models.yaml                             several models
    python -m collab_megatron.evaluate conf/demo_evaluate_models.yaml --models base rl            some of them

A model is a Hugging Face folder, a hub name, a run's checkpoint (converted once) or an API model. An engine is started
for each in turn (or `engine.urls` is used). It plays conversations at `evaluation.temperature` with the simulated user
and with those of `evaluation.users`. The figures go to `output` as JSON, all conversations next to it as JSON lines,
the table of all models and users as JSON and Markdown; TensorBoard gets both. The config of an RL run works too.

Samples and paid replies are kept in a journal, so an interrupted evaluation continues without sampling or paying again.
A spent budget ends it with exit code 3 and the figures of the finished conversations.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import uvloop
from rich.console import Console

from collab_megatron import __version__
from collab_megatron.config import EvaluateConfig, load_config, show_config
from collab_megatron.config.sections import ComparedModelSection
from collab_megatron.data.parquet import read_task_files
from collab_megatron.engine.control import served_weights
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import BudgetSpent, EvaluationFailed, run_cli
from collab_megatron.figures import values
from collab_megatron.files import keep_from_others, publish_json, publish_text
from collab_megatron.launch.attempts import begin_attempt
from collab_megatron.launch.cli import parse_arguments
from collab_megatron.launch.conversion import checkpoint_of, hf_folder_of
from collab_megatron.launch.lock import RunLock, run_lock
from collab_megatron.launch.preflight import check_evaluate
from collab_megatron.launch.run_processes import launch_engine_only, on_chosen_device
from collab_megatron.launch.site import child_env
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.log import set_up_logging
from collab_megatron.model.folder import resolve_model_folder
from collab_megatron.rollout.clients import open_clients, usable_tasks
from collab_megatron.rollout.comparison import Cell, cells_of, table
from collab_megatron.rollout.evaluation import Evaluation, evaluate, evaluation_calls
from collab_megatron.rollout.evaluation_tasks import with_system_message
from collab_megatron.rollout.journal.store import Journal, open_journal
from collab_megatron.rollout.judged_pairs import judge_cells
from collab_megatron.rollout.lineage import model_fingerprint
from collab_megatron.rollout.llm.templates import proactive_message
from collab_megatron.rollout.rewards import judge_calls
from collab_megatron.rollout.transcripts import write_transcripts
from collab_megatron.trainer.report.comparison_table import markdown, rich_table
from collab_megatron.trainer.report.evaluation_table import evaluation_table
from collab_megatron.wire.checkpoints import read_info
from collab_megatron.wire.protocol import LOST_CONVERSATIONS, require_most

NAME = "evaluate"
NO_LIMIT = 2**31
"""Context length of an API model in tokens: the API knows its own."""


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
    *,
    row: str = "",
) -> Result:
    """Play the held-out conversations with model `row` of `config.rows`; the figures include those of the API calls."""
    section = config.rows[row]
    async with open_clients(
        config,
        engine_urls=engine_urls,
        max_context_tokens=max_context_tokens,
        journal=journal,
        engine_keys=engine_keys,
    ) as clients:
        tasks, _ = read_task_files(config.data.validation_files)
        if section.proactive:
            text = proactive_message(section.proactive_prompt_file)
            tasks = [with_system_message(task, text) for task in tasks]
        budget = clients.gateway.budget
        calls = evaluation_calls(config.evaluation, judge_calls(config.reward, config.simulators))
        if section.api is not None:
            calls += config.evaluation.max_assistant_turns
        played = await evaluate(
            usable_tasks(tasks, clients, config.rollout.max_prompt_tokens),
            evaluation=config.evaluation,
            weights=config.reward.metric_weights,
            clamps=config.reward.metric_clamps,
            limits=clients.limits,
            players=clients.players,
            within=partial(budget.room, calls),
            users=clients.evaluation_users,
            api=None if section.api is None else clients.api_models[row],
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


def with_paths(config: EvaluateConfig, folders: Mapping[str, Path]) -> EvaluateConfig:
    """The config with other paths of its models: path -> folder."""

    def moved(path: str) -> str:
        return str(folders.get(path, path))

    models = {
        name: row if row.path is None else row.model_copy(update={"path": moved(row.path)})
        for name, row in config.models.items()
    }
    model = config.model.model_copy(update={"path": moved(config.model.path)})
    return config.model_copy(update={"model": model, "models": models})


def of_row(config: EvaluateConfig, name: str) -> EvaluateConfig:
    """The config for one model: `model.path` is its path, and its servers have logs of their own."""
    path = config.rows[name].path
    if not name:
        return config
    run = config.run.model_copy(update={"name": f"{config.run.name}-{name}"})
    model = config.model if path is None else config.model.model_copy(update={"path": path})
    return config.model_copy(update={"run": run, "model": model})


def weights_name(config: EvaluateConfig, urls: Sequence[str], row: str = "") -> str:
    """16 hex digits that identify the policy by contents, not paths. Other settings of the evaluation do not count, so
    another judge or more tasks reuse the earlier samples. Raises UserError for servers with different weights."""
    api = config.rows[row].api
    if api is not None:
        decides: dict[str, object] = {"api": [row, api.model]}
    else:
        decides = {
            "files": model_fingerprint(resolve_model_folder(config.model.path)),
            "served": served_weights(urls, timeout_s=config.engine.startup_timeout_s) if config.engine.urls else None,
            "dtype": config.model.dtype,
            "engine": [config.engine.context_length, *config.engine.extra_args],
            "version": __version__,
        }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def own_journal(config: EvaluateConfig, weights: str) -> Journal:
    """The journal for these weights. It lies next to `journal.path` if that is set, because that file may belong to a
    running training. One model has a file for each set of weights, so that a budget cap applies to it alone; several
    models share one, so that the cap applies to their table. Raises UserError for another kind of file."""
    path = config.journal.path
    folder = config.run.dir / "journal" if path is None else path.parent
    section = config.journal.model_copy(update={"path": None})
    file = f"{config.run.name}-models" if config.models else f"{config.run.name}-{weights}"
    return open_journal(section, folder / f"{file}.sqlite", weights)


def main() -> None:
    arguments = parse_arguments(__doc__, several_models=True)
    set_up_logging("evaluate")
    given = own_name(load_config(EvaluateConfig, arguments.config, arguments.overrides, models=arguments.models))
    keep_from_others(given.run.umask)
    if arguments.dry_run:
        print(show_config(given), flush=True)
    paths = [given.model.path, *given.served]
    checkpoints = {path: checkpoint for path in paths if (checkpoint := checkpoint_of(path)) is not None}
    # check everything else before the conversion: the checkpoint contains config and tokenizer
    infos = {path: read_info(checkpoint) for path, checkpoint in checkpoints.items()}
    config = with_paths(given, {path: info.hf_folder for path, info in infos.items()})
    if arguments.dry_run:
        check_evaluate(config, dry_run=True, node=arguments.node)
        return
    served = {name: path_of(given, row) for name, row in given.rows.items()}
    steps = {name: infos[path].step for name, path in served.items() if path is not None and path in infos}
    with run_lock(config.run) as lock:
        contexts = check_evaluate(config, node=arguments.node)
        for path in given.served:
            if path in checkpoints:
                checked = str(infos[path].hf_folder)
                folder = hf_folder_of(checkpoints[path], config.run.dir / "converted", config.run.logs_dir)
                config = with_paths(config, {checked: folder})
                contexts[str(folder)] = contexts[checked]
        config = on_chosen_device(config)
        results = play_rows(config, contexts, lock)
        stop = next((result.played.stop for result in results.values() if result.played.stop), "")
        if any(result.played.done for result in results.values()) or not stop:  # else keep those of an earlier attempt
            stop = report(config, given, results, steps, judge=not stop) or stop
    if stop:
        done, wanted = (sum(getattr(each.played, name) for each in results.values()) for name in ("done", "wanted"))
        missing = [name for name in config.rows if name not in results]
        rest = f"; models that were not started: {', '.join(missing)}" if missing else ""
        raise BudgetSpent(f"{done} of {wanted} held-out conversations were played{rest}: {stop}")
    for result in results.values():
        require_most([result.played.tally], LOST_CONVERSATIONS, EvaluationFailed)


def path_of(config: EvaluateConfig, row: ComparedModelSection) -> str | None:
    """Path of the weights of a row; None for an API model."""
    return None if row.api is not None else row.path or config.model.path


def play_rows(config: EvaluateConfig, contexts: Mapping[str, int], lock: RunLock) -> dict[str, Result]:
    """Play all models in turn, neighbors with the same weights on the same servers. Stops after a spent budget.

    contexts: path -> context length in tokens."""
    results: dict[str, Result] = {}
    for path, names in groupby(config.rows, key=lambda name: path_of(config, config.rows[name])):
        rows = list(names)
        own = of_row(config, rows[0])
        logs = begin_attempt(own.run.logs_dir).folder
        with Supervisor(logs, held=lock.held, env=child_env(own)) as supervisor:
            urls: list[str] = []
            keys: EngineKeys | None = None
            if path is not None:
                urls, keys = launch_engine_only(supervisor, own)
            for name in rows:
                if config.models:
                    print(f"\nmodel {name}", flush=True)
                played = of_row(config, name)
                with closing(own_journal(config, weights_name(played, urls, name))) as journal:
                    context = NO_LIMIT if path is None else contexts[path]
                    results[name] = uvloop.run(play(played, urls, context, journal, keys, row=name))
                if results[name].played.stop:
                    return results
    return results


def report(
    config: EvaluateConfig,
    given: EvaluateConfig,
    results: Mapping[str, Result],
    steps: Mapping[str, int],
    *,
    judge: bool,
) -> str:
    """Write figures, conversations and the table to disk, and print them. Returns why pairs were not judged, if the
    budget is spent. `given`: the config with the paths that the user named; `steps`: training steps of the models;
    `judge`: whether pairs may be judged."""
    output = config.output or config.run.evaluations_dir / (
        "models.json" if config.models else f"{Path(config.model.path).name}.json"
    )
    stem, stop = output.name.removesuffix(".json"), ""  # a model's name may contain a dot
    cells: list[Cell] = []
    for name, result in results.items():
        own = output.with_name(f"{stem}-{name}.json") if name else output
        title = name or given.model.path
        report_row(title, result, own, list(config.reward.metric_weights))
        cells += cells_of(name or Path(config.model.path).name, result.played)
    baseline = config.compare.baseline or cells[0].model
    if config.compare.judged_pairs and judge:
        try:
            with closing(own_journal(config, "pairs")) as journal:
                cells = uvloop.run(judge_cells(config, cells, baseline, journal))
        except BudgetSpent as spent:
            stop = str(spent)
    whole = table(cells, config.reward.metric_weights, config.compare, baseline=baseline, seed=config.evaluation.seed)
    publish_json(output.with_name(f"{stem}.table.json"), whole)
    publish_text(output.with_name(f"{stem}.table.md"), markdown(whole))
    to_tensorboard(config, results, steps, markdown(whole))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print()
    console.print(rich_table(whole))
    print(f"  table          {output.with_name(f'{stem}.table.md')}, .json", flush=True)
    return stop


def report_row(model: str, result: Result, output: Path, metrics: Sequence[str]) -> None:
    """Write figures and conversations of one model to disk, and print its figures."""
    stem = output.name.removesuffix(".json")
    for user, groups in result.played.by_user.items():
        write_transcripts(output.with_name(f"{stem}.{user}.jsonl" if user else f"{stem}.jsonl"), 0, groups)
    publish_json(output, dict(sorted(result.figures.items())))
    print(f"\nheld-out conversations with {model}\n")
    for line in evaluation_table(result.figures, metrics):
        print(f"  {line}")
    print(f"\n  figures        {output}\n  conversations  {output.with_name(f'{stem}.jsonl')}", flush=True)


def to_tensorboard(config: EvaluateConfig, results: Mapping[str, Result], steps: Mapping[str, int], page: str) -> None:
    """The figures of each model as eval/..., at its training step, and the table as a page of text."""
    from collab_megatron.trainer.report.dashboard import Dashboard  # imports torch, which takes seconds

    for name, result in results.items():
        step = steps.get(name, 0)
        folder = config.run.tensorboard_dir / name if name else config.run.tensorboard_dir
        dashboard = Dashboard(folder, first_step=max(0, step - 1))  # points of earlier checkpoints stay
        dashboard.text("table", page)
        dashboard.log(step, {f"eval/{figure}": value for figure, value in result.figures.items()})
        dashboard.close()


if __name__ == "__main__":
    run_cli(main)
