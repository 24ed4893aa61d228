"""Grow multi-turn CollabLLM conversations from single-turn problems.

    python tools/build_dataset.py conf/build.yaml [section.key=value ...] [--dry-run]

`problems` is any single-turn dataset; `mapping` names its columns (conf/mappings/). The assistant is an API model, or
`model`, which the build serves with SGLang. Writes conversations-*.jsonl (CollabLLM rows, flat or nested) into the
config's `output` folder; tools/prepare_dataset.py reads it.
The same command continues an interrupted build: finished conversations are not repeated, and paid LLM answers of the
others come from the `journal`. Exit code 2 for an error in config or data, 1 if the build failed, 3 if it has spent
its `budget`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from collab_megatron.config import BuildDatasetConfig, load_config, show_config
from collab_megatron.data_engine.build import BuildProgress, build_dataset
from collab_megatron.errors import BudgetSpent, RunError, run_cli
from collab_megatron.files import keep_from_others, publish_json
from collab_megatron.launch.build_engine import with_assistant
from collab_megatron.launch.lock import locked
from collab_megatron.launch.preflight import check_build
from collab_megatron.log import set_up_logging
from collab_megatron.rollout.llm.accounting import API_USAGE_FILE, GatewaySnapshot

LOCK_FILE = "build.lock"
QUIET_S = 10.0  # between progress lines where the output is a file


class Display:
    """Progress: one line that is overwritten on a terminal, or a line every few seconds in a file."""

    def __init__(self) -> None:
        self._shown_at = 0.0
        self._warned = False

    def show(self, progress: BuildProgress) -> None:
        if progress.counts.warning and not self._warned:
            self._warned = True
            print(progress.counts.warning, file=sys.stderr, flush=True)
        if sys.stdout.isatty():
            print(f"\r\x1b[K{progress.line()}", end="", flush=True)
        elif time.monotonic() - self._shown_at >= QUIET_S:
            self._shown_at = time.monotonic()
            print(progress.line(), flush=True)

    def finish(self, progress: BuildProgress) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="")
        counts = progress.counts
        print(
            f"{progress.before + counts.done} of {progress.total} conversations ({progress.before} from before, "
            f"{counts.failed} failed), {counts.rows} new rows in {progress.seconds:.1f} s ({progress.per_s:.1f}/s)"
        )
        for role, usage in counts.usage.items():
            print(
                f"  {role}: {usage.calls} calls, {usage.replayed} answers from the journal, {usage.retries} retries, "
                f"{usage.failures} failed, {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
                f"${usage.cost_usd:.4f}"
            )
        print(f"  all: {progress.calls} calls, ${progress.cost_usd:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/build_dataset.py", description="Grow multi-turn conversations from single-turn problems."
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print config and plan, check both, make no calls")
    args = parser.parse_intermixed_args()
    set_up_logging("build")
    config = load_config(BuildDatasetConfig, args.config, args.overrides)
    keep_from_others(config.umask)
    if args.dry_run:
        print(show_config(config), flush=True)
    check_build(config, dry_run=args.dry_run)
    if args.dry_run:
        return
    display = Display()
    with locked(config.output / LOCK_FILE, f"output={config.output}", "choose another output folder") as lock:
        with with_assistant(config, lock) as served:
            progress = build_dataset(served, display.show)
        display.finish(progress)
        publish_json(config.output / API_USAGE_FILE, GatewaySnapshot(progress.counts.usage).metrics())
    if progress.counts.spent and not progress.complete:
        raise BudgetSpent(progress.counts.spent)
    if progress.counts.done == 0 and progress.before < progress.total:
        raise RunError(f"no conversation was finished; the last error: {progress.counts.last_error}")


if __name__ == "__main__":
    run_cli(main)
