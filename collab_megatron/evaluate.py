"""Plays whole held-out conversations with a model as it stands and writes the figures.

    python -m collab_megatron.evaluate conf/demo_evaluate.yaml [section.key=value ...] [--dry-run]

Starts an engine for `model.path` (or uses `engine.urls`), plays at `evaluation.temperature`, prints the figures and
writes them to `output` as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

import uvloop

from collab_megatron.cluster.cli import parse_arguments
from collab_megatron.cluster.launch import launch_engine_only
from collab_megatron.cluster.preflight import check_evaluate
from collab_megatron.cluster.processes import Supervisor
from collab_megatron.config import EvaluateConfig, dump_config, load_config
from collab_megatron.data.parquet import read_task_files
from collab_megatron.driver.cast import assemble, usable_tasks
from collab_megatron.driver.evaluation import evaluate
from collab_megatron.driver.figures import values
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.log import set_up_logging


async def play(config: EvaluateConfig, engine_urls: Sequence[str], max_context_tokens: int) -> dict[str, float]:
    """Figures over the held-out tasks, and the API calls made for them."""
    if config.data.validation is None:
        raise UserError("data.validation is not set: name the held-out parquet")
    async with assemble(config, engine_urls=engine_urls, max_context_tokens=max_context_tokens) as cast:
        tasks = usable_tasks(read_task_files(config.data.validation_files)[0], cast, config.rollout.max_prompt_tokens)
        figures, _ = await evaluate(
            tasks,
            evaluation=config.evaluation,
            weights=config.reward.metric_weights,
            limits=cast.limits,
            players=cast.players,
        )
        return values(figures) | cast.gateway.snapshot().metrics()


def main() -> None:
    arguments = parse_arguments(__doc__)
    set_up_logging("evaluate")
    config = load_config(EvaluateConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(dump_config(config), flush=True)
    max_context_tokens = check_evaluate(config, dry_run=arguments.dry_run, node=arguments.node)
    if arguments.dry_run:
        return
    with Supervisor(config.run.logs_dir) as supervisor:
        urls = launch_engine_only(supervisor, config)
        figures = uvloop.run(play(config, urls, max_context_tokens))
    calls = sum(value for name, value in figures.items() if name.endswith("/calls"))
    for name, value in sorted(figures.items()):
        if not name.startswith("simulator/"):  # those stand in the output file
            print(f"  {name:24s} {value:.4f}")
    print(f"  {calls:.0f} LLM calls, ${figures['simulator/cost_usd']:.4f}")
    if config.output is not None:
        publish_json(config.output, dict(sorted(figures.items())))


if __name__ == "__main__":
    run_cli(main)
