"""The demo's RL with each algorithm and three seeds. `make demo-algorithms` calls this; it takes hours on two cores.

python tools/demo_algorithms.py [--run-dir runs/demo_algorithms] [--seeds 1 2 3] [--algorithms grpo gspo]
python tools/demo_algorithms.py --short --run-dir DIR     # every stage for a few steps; nothing is learned
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a file, Python finds only tools/

from collab_megatron.config.sections import UMASKS  # noqa: E402
from collab_megatron.demo.algorithms import ALGORITHMS, SEEDS, print_table, run_algorithms  # noqa: E402
from collab_megatron.demo.pipeline import DemoSettings, Device  # noqa: E402
from collab_megatron.errors import run_cli  # noqa: E402
from collab_megatron.files import keep_from_others  # noqa: E402
from collab_megatron.launch.path_checks import check_folder  # noqa: E402
from tools.demo import short_settings  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/demo_algorithms.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo_algorithms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--device", choices=get_args(Device), default="cpu", help="the CPU on any machine, or one GPU")
    parser.add_argument("--short", action="store_true", help="a few steps of everything; nothing is learned")
    args = parser.parse_args()
    keep_from_others(UMASKS[0])
    run_dir = args.run_dir.absolute()
    check_folder("--run-dir", run_dir)
    if args.short:
        settings = short_settings(run_dir, args.seeds[0], args.device)
    else:
        settings = DemoSettings(run_dir, args.seeds[0], args.device)
    rows = run_algorithms(settings, REPOSITORY, algorithms=args.algorithms, seeds=args.seeds)
    print_table(rows, args.run_dir)


if __name__ == "__main__":
    run_cli(main)
