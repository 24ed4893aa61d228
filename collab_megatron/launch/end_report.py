"""The launcher's last lines at the end of a run: results or the saved state, and the commands to type next."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from collab_megatron.config.sections import RunSection
from collab_megatron.errors import EXIT_USER, RunError
from collab_megatron.json_lines import read_rows
from collab_megatron.wire.checkpoints import newest_complete, read_info

SHOWN_FIGURES = 6  # of an evaluation


@contextmanager
def report_at_end(run: RunSection, steps: int, config: Path | None, *, exported: Path | None = None) -> Iterator[None]:
    """Wraps the launch: prints a summary on success, else the saved state and how to resume.

    config: the config file, if an evaluation can read it. exported: the model folder that the run wrote. A user's
    mistake (exit code 2) started nothing and prints neither.
    """
    try:
        yield
    except (KeyboardInterrupt, RunError):
        _say(saved(run, steps), error=True)
        raise
    except SystemExit as end:
        if end.code not in (0, None, EXIT_USER):
            _say(saved(run, steps), error=True)
        raise
    _say(summary(run, steps, config, exported=exported), error=False)


def saved(run: RunSection, steps: int) -> list[str]:
    """The checkpoint to resume from."""
    newest = newest_complete(run.checkpoints_dir)
    if newest is None:
        return ["saved       no checkpoint yet: the same command starts from the beginning"]
    step = read_info(newest).step
    how = "the same command" if run.resume else "the same command with run.resume=true"
    if step >= steps:
        return [f"saved       {newest}, {step} of {steps} steps: training is done, {how} finishes the rest"]
    return [f"saved       {newest}, {step} of {steps} steps: {how} goes on from it"]


def summary(run: RunSection, steps: int, config: Path | None, *, exported: Path | None = None) -> list[str]:
    """The results of a finished run, and the commands that use them."""
    newest = newest_complete(run.checkpoints_dir)
    lines = [f"done        {steps} steps of {run.name}"]
    if newest is not None:
        lines.append(f"checkpoint  {newest}, {read_info(newest).step} of {steps} steps")
    evaluated = last_evaluation(run.tensorboard_dir / "metrics.jsonl")
    if evaluated is not None:
        step, figures = evaluated
        said = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        lines.append(f"held out    after step {step}: {said}")
    if exported is not None:
        lines.append(f"model       {exported}")
    elif newest is not None:
        lines += _export(run, newest)
    if newest is not None and config is not None:
        lines.append(f"evaluate    python -m collab_megatron.evaluate {config} model.path={newest}")
    lines.append(f"curves      tensorboard --logdir {run.tensorboard_dir.parent}")
    return lines


def _export(run: RunSection, newest: Path) -> list[str]:
    target = run.dir / f"{run.name}_hf"
    return [f"export      python tools/convert_checkpoint.py megatron-to-hf --checkpoint {newest} --output {target}"]


def last_evaluation(metrics: Path) -> tuple[int, dict[str, float]] | None:
    """(step, figures) of the newest line of metrics.jsonl with held-out figures; None without such a line.

    Raises UserError for a damaged line."""
    for row in reversed(read_rows(metrics, numbers=("step",)).rows):
        found = {
            name.removeprefix("eval/"): value
            for name, value in row.items()
            if name.startswith("eval/") and not name.endswith(("_std", "_s", "_share")) and name.count("/") == 1
        }
        if found:
            first = sorted(found, key=lambda name: (name not in ("mr", "loss"), name.startswith("conv"), name))
            return int(row["step"]), {name: found[name] for name in first[:SHOWN_FIGURES]}
    return None


def _say(lines: Sequence[str], *, error: bool) -> None:
    print("\n".join(["", *lines]), file=sys.stderr if error else sys.stdout, flush=True)
