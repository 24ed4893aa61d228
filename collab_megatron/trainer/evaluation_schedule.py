"""Schedule of held-out evaluations between training steps. A failed evaluation is a warning; training goes on."""

from __future__ import annotations

from functools import partial

from collab_megatron.config import RLConfig
from collab_megatron.errors import NoEngineLeft, RunError, RunStops, WeightsDiffer
from collab_megatron.trainer.actor.agreement import fail_together, on_rank_zero
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.engines import BatchSource
from collab_megatron.trainer.rl_reporter import RLReporter
from collab_megatron.wire.completion import is_evaluated

ENDS_THE_RUN = (NoEngineLeft, WeightsDiffer, RunStops)
"""Errors of an evaluation after which no further step can or may be taken."""


class EvaluationSchedule:
    """Build and use it on every rank alike."""

    def __init__(self, engines: BatchSource, reporter: RLReporter | None, grid: RankGrid, config: RLConfig) -> None:
        """reporter: on rank 0."""
        self._engines, self._reporter, self._grid, self._config = engines, reporter, grid, config

    def evaluate_at_start(self, done: int) -> None:
        """Before the first step of a new run, not of a resumed one. Collective. Raises as `evaluate_if_due` does."""
        if done == 0 and self._config.train.eval_at_start:
            self._evaluate(done)

    def evaluate_if_due(self, done: int) -> None:
        """After `done` steps, at train.eval_interval and after the last step. Collective.

        Raises ENDS_THE_RUN; any other failure is reported.
        """
        if self._config.train.evaluates_after(done):
            self._evaluate(done)

    def evaluate_missing(self, done: int) -> None:
        """On a resume after `done` steps: the evaluation that was due and that the earlier attempt did not finish.
        Collective. Raises as `evaluate_if_due` does."""
        if done and not on_rank_zero(self._grid, partial(is_evaluated, self._config.run.evaluations_file, done)):
            self.evaluate_if_due(done)

    def _evaluate(self, done: int) -> None:
        if not self._config.evaluates:
            return
        figures, failure = None, ""
        try:
            figures = self._engines.evaluate(done)
        except ENDS_THE_RUN:
            raise
        except RunError as error:
            failure = str(error)
        with fail_together(self._grid, "reporting", self._config.run.dir):
            if self._reporter is None:
                return
            if figures is None:
                self._reporter.evaluation_failed(done, failure)
            else:
                self._reporter.evaluation(done, figures)
