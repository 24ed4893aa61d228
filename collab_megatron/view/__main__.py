"""Writes a run's conversations as one HTML file, and opens it.

    python -m collab_megatron.view runs/x                        every tree, and the held-out conversations
    python -m collab_megatron.view runs/x --compare runs/y       the same prompts in two runs, next to each other
    python -m collab_megatron.view runs/x --steps 0,20,40        the same prompts at these steps

The file needs no network and no server. It holds the whole conversations: treat it like the record (docs/record.md).
"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path

from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_text
from collab_megatron.view.page import read_bundle, read_style, render_page
from collab_megatron.view.payload import Payload, PayloadBuilder
from collab_megatron.view.sources import find_sources
from collab_megatron.view.token_words import find_tokenizer, token_words

MAX_TREES = 20_000
OWNER_ONLY = 0o600


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run.dir, a folder of shard*.jsonl, or a transcript (.jsonl)")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="a second run, shown on the same prompts")
    parser.add_argument("--steps", default="", metavar="N,N,...", help="only the trees of these steps")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: viewer.html in the run's folder")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: that of the run's newest checkpoint")
    parser.add_argument("--max-trees", type=int, default=MAX_TREES, metavar="N", help="default: %(default)s")
    parser.add_argument("--no-open", action="store_true", help="write the file only")
    args = parser.parse_args(argv)
    script, style = read_bundle(), read_style()  # before anything slow
    runs = [args.run] if args.compare is None else [args.run, args.compare]
    payload = read_payload(runs, parse_steps(args.steps), max_trees=args.max_trees, tokenizer=args.tokenizer)
    output = args.output or (args.run if args.run.is_dir() else args.run.parent) / "viewer.html"
    page = render_page(payload, title=" and ".join(map(str, runs)), script=script, style=style)
    publish_text(output, page, rights=OWNER_ONLY)
    print(f"{output}: {payload.trees:,} trees, {len(page) / 1e6:.1f} MB", flush=True)
    if payload.left_out:
        print(f"left out: {payload.left_out:,} trees over --max-trees {args.max_trees}; --steps selects", flush=True)
    if not args.no_open and has_display():
        webbrowser.open(output.absolute().as_uri())


def read_payload(runs: list[Path], steps: tuple[int, ...], *, max_trees: int, tokenizer: Path | None) -> Payload:
    """Everything that the page shows. Raises UserError."""
    if max_trees < 1:
        raise UserError(f"--max-trees {max_trees} leaves nothing to show: give a number above 0")
    builder = PayloadBuilder(max_trees, steps)
    for run in runs:
        builder.add_run(str(run), find_sources(run))
    words = []
    for number, run in enumerate(runs):
        path = tokenizer or find_tokenizer(run)
        words.append({} if path is None else token_words(path, builder.token_ids(number)))
    return builder.finish(words)


def parse_steps(given: str) -> tuple[int, ...]:
    """Steps in ascending order. Raises UserError."""
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--steps {given[:40]} is not a list of steps: write it like 0,20,40")
    return tuple(sorted(set(map(int, parts))))


def has_display() -> bool:
    """Whether a window can open; without one Python would start a text browser in this terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


if __name__ == "__main__":
    run_cli(main)
