"""What a driver process does with its players: grow one tree, evaluate its share of the held-out tasks."""

from __future__ import annotations

from functools import partial

from collab_megatron.config import RLConfig
from collab_megatron.data.parquet import read_task_files
from collab_megatron.errors import RunError
from collab_megatron.rollout.cast import Cast, usable_tasks
from collab_megatron.rollout.conversation import STOPS_ALL
from collab_megatron.rollout.evaluation import evaluate
from collab_megatron.rollout.forest import ForestRules, Tree
from collab_megatron.rollout.group import GroupRules, grow_group, sample_replies
from collab_megatron.rollout.llm.budget import Reservation
from collab_megatron.rollout.rewards import judge_calls
from collab_megatron.rollout.shard import Shard
from collab_megatron.rollout.transcripts import keep_newest, transcript_file, write_transcripts
from collab_megatron.rollout.worth import evaluation_calls, tree_calls
from collab_megatron.types import Group, Task
from collab_megatron.wire.protocol import Answer


class Work:
    """One shard's tasks and the rules they are played by. Raises UserError for data that cannot be used."""

    def __init__(self, config: RLConfig, cast: Cast, index: int) -> None:
        self._config, self._cast = config, cast
        driver, rollout = config.driver, config.rollout
        limit, oversample = rollout.max_prompt_tokens, driver.oversample_prompts
        tasks, _ = read_task_files(config.data.train_files)
        usable = usable_tasks(tasks, cast, limit)
        self.left_out = len(tasks) - len(usable)  # training prompts that are too long
        self.left_out_share = self.left_out / len(tasks)
        self.shard = Shard(
            usable,
            seed=config.run.seed,
            prompts_per_step=rollout.prompts_per_step,
            futures_per_tree=rollout.num_replies * max(rollout.num_repeat_rollouts, 1),
            index=index,
            count=driver.shards,
        )
        judges = judge_calls(config.reward, config.simulators)
        self._tree_calls = tree_calls(rollout, judges)
        self._evaluation_calls = evaluation_calls(config.evaluation, judges)
        self._validation: list[Task] = []
        if config.data.validation is not None:
            self._validation = usable_tasks(read_task_files(config.data.validation_files)[0], cast, limit)
        self.forest_rules = ForestRules(
            max_staleness=driver.max_staleness,
            # a shard's part may be 0 trees, where oversample_prompts=0 stands for a whole batch
            oversample=len(range(index, oversample, driver.shards)) if oversample else None,
            by_prompt=driver.order == "prompt",
            refills=len(range(index, driver.refill_groups, driver.shards)),
        )
        self._group_rules = GroupRules(
            num_replies=rollout.num_replies,
            num_futures=rollout.num_repeat_rollouts,
            min_replies=rollout.min_replies,
            min_futures=driver.min_futures,
            group_timeout_s=driver.group_timeout_s,
            advantage_eps=config.algorithm.advantage_eps,
            min_group_std=config.algorithm.min_group_std,
        )

    def reserve(self) -> Reservation | None:
        """Room for one more tree in the budget; None where there is none."""
        return self._cast.gateway.budget.reserve(self._tree_calls)

    async def grow(self, tree: Tree) -> Group:
        """The tree's group. One whose replies cannot be sampled is dropped, with the reason. Raised are STOPS_ALL and a
        bug of the user's own metric."""
        task, players, limits = self.shard.task(tree.seat), self._cast.players, self._cast.limits
        rules = self._group_rules
        try:
            prompt_ids, turns_G = await sample_replies(task, tree.seat, rules.num_replies, limits, players)
        except STOPS_ALL:
            raise
        except RunError as error:
            return Group(task, (), (), kept=False, error=str(error))
        except Exception as error:  # noqa: BLE001 - logged there; too many of them stop the run
            words = players.unexpected.note(error, f"the replies of tree {tree.seat}, task {task.task_id},")
            return Group(task, (), (), kept=False, error=words)
        tree.version = min((v for turn in turns_G for v in turn.generation.versions_T), default=None)
        return await grow_group(task, prompt_ids, turns_G, tree.seat, rules=rules, limits=limits, players=players)

    async def evaluate(self, step: int) -> Answer:
        """Figures of this shard's share of the held-out tasks; the conversations go to the disk, whatever they are."""
        budget, section, run = self._cast.gateway.budget, self._config.evaluation, self._config.run
        if stop := budget.exhausted:
            return Answer(error=stop, stop="budget")
        played = await evaluate(
            self._validation,
            evaluation=section,
            weights=self._config.reward.metric_weights,
            limits=self._cast.limits,
            players=self._cast.players,
            step=step,
            shard=self.shard.index,
            shards=self.shard.count,
            within=partial(budget.room, self._evaluation_calls),
        )
        write_transcripts(transcript_file(run.evaluations_dir, step, self.shard.index), step, played.groups)
        keep_newest(run.evaluations_dir, section.keep_transcripts, self.shard.index, step=step)
        if played.stop:
            return Answer(error=played.stop, stop="budget")
        unexpected = self._cast.players.unexpected
        if (stop := unexpected.verdict()) is not None:
            return Answer(error=stop, stop="errors")
        unexpected.begin()
        return Answer(figures=played.figures, tally=played.tally)
