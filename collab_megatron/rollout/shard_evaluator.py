"""Evaluation during training: one shard's share of the held-out conversations, as an answer to the trainer."""

from __future__ import annotations

from functools import partial

from collab_megatron.config import RLConfig
from collab_megatron.data.parquet import read_task_files
from collab_megatron.rollout.clients import RolloutClients, usable_tasks
from collab_megatron.rollout.evaluation import evaluate, evaluation_calls
from collab_megatron.rollout.rewards import judge_calls
from collab_megatron.rollout.transcripts import keep_newest, transcript_file, write_transcripts
from collab_megatron.types import Task
from collab_megatron.wire.protocol import Answer


class ShardEvaluator:
    """Evaluates shard `index` of the held-out tasks. Raises UserError for a validation file that cannot be used."""

    def __init__(self, config: RLConfig, clients: RolloutClients, index: int) -> None:
        self._config, self._clients, self._index = config, clients, index
        self._calls = evaluation_calls(config.evaluation, judge_calls(config.reward, config.simulators))
        self._tasks: list[Task] = []
        if config.data.validation is not None:
            tasks, _ = read_task_files(config.data.validation_files)
            self._tasks = usable_tasks(tasks, clients, config.rollout.max_prompt_tokens)

    async def evaluate(self, step: int) -> Answer:
        """Figures of the shard's conversations under the weights after `step` steps; the transcripts go to the disk.

        Waits for all conversations, at most `evaluation.timeout_s`. Raises STOPS_ALL and a bug of the user's own
        metric.
        """
        budget, section, run = self._clients.gateway.budget, self._config.evaluation, self._config.run
        if stop := budget.exhausted:
            return Answer(error=stop, stop="budget")
        played = await evaluate(
            self._tasks,
            evaluation=section,
            weights=self._config.reward.metric_weights,
            clamps=self._config.reward.metric_clamps,
            limits=self._clients.limits,
            players=self._clients.players,
            step=step,
            shard=self._index,
            shards=self._config.driver.shards,
            within=partial(budget.room, self._calls),
            users=self._clients.evaluation_users,
        )
        for user, groups in played.by_user.items():
            folder = run.evaluations_dir / "users" / user if user else run.evaluations_dir
            write_transcripts(transcript_file(folder, step, self._index), step, groups)
            keep_newest(folder, section.keep_transcripts, self._index, step=step)
        if played.stop:
            return Answer(error=played.stop, stop="budget")
        unexpected = self._clients.players.unexpected
        if (stop := unexpected.verdict()) is not None:
            return Answer(error=stop, stop="errors")
        unexpected.begin()
        return Answer(figures=played.figures, tally=played.tally)
