"""Commands that `pip install` puts on PATH: `collab-NAME` runs the same program as `python -m collab_megatron.NAME`.

A program is imported when it is asked for: most import torch, which takes seconds.
"""

from __future__ import annotations

import importlib

from collab_megatron.errors import run_cli


def run(program: str) -> None:
    """Run collab_megatron.PROGRAM with the words of the command line; ends the process."""
    run_cli(importlib.import_module(f"collab_megatron.{program}").main)


def train_rl() -> None:
    run("train_rl")


def train_sft() -> None:
    run("train_sft")


def train_dpo() -> None:
    run("train_dpo")


def evaluate() -> None:
    run("evaluate")


def rescore() -> None:
    run("rescore")


def collect() -> None:
    run("collect")


def watch() -> None:
    run("watch")


def view() -> None:
    run("view.__main__")


def doctor() -> None:
    run("doctor.__main__")
