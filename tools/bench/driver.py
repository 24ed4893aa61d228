"""Benchmark of the driver: its time against the shortest possible one and the recipe's, its own CPU cost, its memory.

    python tools/bench/driver.py [--json FILE] [--parts main recipe ahead shards] [--small] [--memory CONVERSATIONS]

Starts the driver's processes as a run does, an LLM endpoint for simulator and judge with seeded lognormal latencies
(median 2 s, sigma 0.8), and an engine stand-in with a fixed service rate (tools/bench/driver_servers.py). No GPU, no
network.

main    128 prompts x 8 replies x 3 futures, each reply, user, policy, user, policy, judge. `lower_bound_s` is the
        largest of: the longest single chain; engine tokens / capacity; API latencies / allowed concurrency; bare
        LiteLLM CPU time of these calls / driver processes. `own_ms_per_turn` is the driver's CPU time beyond bare
        LiteLLM's, for each policy turn, user turn and verdict. Then again with 2 % of the calls failing once.
recipe  the same calls in the recipe's control flow (tools/bench/driver_recipe.py), without and with failures.
ahead   steps with max_staleness 0 and 1 and a training step as long as a rollout: the ratio of their times from the
        delivery of the first batch to the end of the last training step. N steps can reach (2 N - 1) / N.
shards  no latencies, so that the CPU is the limit: the time of one driver process / that of two.

--memory plays short conversations instead and compares resident memory after a third of them and at the end.
--small is for tests: tiny trees, short latencies, shorter waits of the recipe; its figures mean nothing.
The full run takes about ten minutes. Figures need an idle machine with one core more than driver processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("main", "recipe", "ahead", "shards")


def parse() -> argparse.Namespace:
    from collab_megatron.errors import UserError

    parser = argparse.ArgumentParser(
        prog="python tools/bench/driver.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the figures of other parts are null"
    )
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes, for tests")
    parser.add_argument("--shards", type=int, default=2, help="driver processes of the main part")
    parser.add_argument("--memory", type=int, metavar="CONVERSATIONS", help="only the memory part, with this number")
    args = parser.parse_args()
    if args.shards < 1:
        raise UserError("--shards must be at least 1")
    if args.memory is not None and args.memory < 1:
        raise UserError("--memory must be at least 1")
    if "recipe" in args.parts and "main" not in args.parts:
        raise UserError("--parts recipe compares with main: name both")
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from collab_megatron.files import publish_json
    from tools.bench.driver_parts import run_memory, run_parts, table

    if args.memory is not None:
        figures = run_memory(args.memory, REPOSITORY)
    else:
        figures = run_parts(args.parts, REPOSITORY, small=args.small, shards=args.shards)
    print(table(figures), flush=True)
    if args.json:
        publish_json(args.json, figures)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))  # to import tools.bench
    from collab_megatron.errors import run_cli

    run_cli(main)
