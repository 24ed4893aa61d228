"""Where a run starts: at step 0 or after its newest checkpoint; and what is missing when all steps are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from collab_megatron.config import RLConfig, SupervisedConfig, kept_config
from collab_megatron.errors import UserError
from collab_megatron.json_lines import read_rows
from collab_megatron.launch.node import Node
from collab_megatron.launch.path_checks import check_run
from collab_megatron.wire.checkpoints import named_checkpoint, newest_complete, read_info
from collab_megatron.wire.completion import METRICS_FILE
from collab_megatron.wire.provenance import decisive_differences

C = TypeVar("C", bound=RLConfig | SupervisedConfig)


@dataclass(frozen=True)
class StartPoint:
    """Where an attempt begins.

    Example: StartPoint(40, None) goes on after step 40; StartPoint(100, ()) of 100 steps has nothing left to do.
    """

    first_step: int
    missing: tuple[str, ...] | None  # what is missing after the last step; None: there are steps to train

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to start processes for."""
        return self.missing == ()


def find_start(config: C, find_missing: Callable[[C], Sequence[str]], node: Node) -> StartPoint:
    """The first step to run and, when all steps are done, the missing results, which are printed.

    A new run must not overwrite the checkpoints of an earlier run, nor resume from another run. `find_missing` lists
    results that are missing after the last step. Raises UserError for a damaged record too."""
    run, steps = config.run, config.train.steps
    if node.here:
        check_run(run)
    newest = newest_complete(run.checkpoints_dir)
    if newest is None:
        if run.init_from is not None:
            try:
                named_checkpoint(run.init_from)
            except UserError as error:
                raise UserError(f"run.init_from: {error}") from None
        return StartPoint(0, None)
    if not run.resume:
        raise UserError(
            f"{run.checkpoints_dir} holds checkpoints of an earlier run: set run.resume=true to resume from "
            f"{newest.name}, or choose another run.dir"
        )
    info = read_info(newest)
    other = decisive_differences(info.extra, kept_config(config)) if run.resume == "auto" else []
    if other:
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        raise UserError(
            f"{run.checkpoints_dir} holds checkpoints of another config ({other[0]}{more}), and run.resume=auto "
            "resumes the same config only: choose another run.dir or run.name, or set run.resume=true to use this one"
        )
    if info.step > steps:
        raise UserError(f"{newest} has already done {info.step} of {steps} steps: raise train.steps to train more")
    for record in (run.tensorboard_dir / METRICS_FILE, run.evaluations_file):
        read_rows(record, numbers=("step",))
    if info.step < steps:
        return StartPoint(info.step, None)
    missing = tuple(find_missing(config))
    what = f"still to do: {', '.join(missing)}" if missing else "nothing is left to do"
    print(f"all {steps} steps are done; {what}", flush=True)
    return StartPoint(info.step, missing)
