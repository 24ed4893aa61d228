"""Tree grower: samples the replies of one prompt and plays their futures; holds the rules of a shard's trees."""

from __future__ import annotations

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import RolloutSection
from collab_megatron.data.parquet import read_task_files
from collab_megatron.errors import RunError
from collab_megatron.rollout.clients import RolloutClients, usable_tasks
from collab_megatron.rollout.future import STOPS_ALL
from collab_megatron.rollout.group import GroupRules, grow_group, sample_replies
from collab_megatron.rollout.group_futures import AutoFutures
from collab_megatron.rollout.llm.budget import Reservation
from collab_megatron.rollout.rewards import judge_calls
from collab_megatron.rollout.rewards.second_judge import second_judge_calls
from collab_megatron.rollout.shard_plan import ShardPlan
from collab_megatron.rollout.tree_scheduler import SchedulerRules, Tree
from collab_megatron.types import Group


class TreeGrower:
    """Grows the trees of one shard. Raises UserError for training data that cannot be used."""

    def __init__(self, config: RLConfig, clients: RolloutClients, index: int) -> None:
        self._clients = clients
        driver, rollout = config.driver, config.rollout
        oversample = driver.oversample_prompts
        tasks, _ = read_task_files(config.data.train_files)
        usable = usable_tasks(tasks, clients, rollout.max_prompt_tokens)
        self.left_out = len(tasks) - len(usable)  # training prompts that are too long
        self.left_out_share = self.left_out / len(tasks)
        self.plan = ShardPlan(
            usable,
            seed=config.run.seed,
            prompts_per_step=rollout.prompts_per_step,
            futures_per_tree=rollout.num_replies * rollout.most_futures,
            index=index,
            count=driver.shards,
        )
        self._tree_calls = tree_calls(rollout, judge_calls(config.reward, config.simulators)) + second_judge_calls(
            config.reward, config.simulators, rollout.tree_futures
        )
        self.scheduler_rules = SchedulerRules(
            max_staleness=driver.max_staleness,
            # a shard's part may be 0 trees, where oversample_prompts=0 stands for a whole batch
            oversample=len(range(index, oversample, driver.shards)) if oversample else None,
            by_prompt=driver.order == "prompt",
            refills=len(range(index, driver.refill_groups, driver.shards)),
        )
        self._group_rules = group_rules(config)

    def reserve(self) -> Reservation | None:
        """Room for one more tree in the budget; None where there is none."""
        return self._clients.gateway.budget.reserve(self._tree_calls)

    async def grow(self, tree: Tree) -> Group:
        """The tree's group. A tree whose replies cannot be sampled is dropped, with the reason.

        Waits for engine, user simulator and judges. Raises STOPS_ALL and a bug of the user's own metric.
        """
        task, players, limits = self.plan.task(tree.id), self._clients.players, self._clients.limits
        rules = self._group_rules
        try:
            prompt_ids, turns_G = await sample_replies(task, tree.id, rules.num_replies, limits, players)
        except STOPS_ALL:
            raise
        except RunError as error:
            return Group(task, (), (), kept=False, error=str(error))
        except Exception as error:  # noqa: BLE001 - logged there; too many of them stop the run
            words = players.unexpected.note(error, f"the replies of tree {tree.id}, task {task.task_id},")
            return Group(task, (), (), kept=False, error=words)
        if self._clients.engine.ages:
            tree.version = min((v for turn in turns_G for v in turn.generation.versions_T), default=None)
        return await grow_group(task, prompt_ids, turns_G, tree.id, rules=rules, limits=limits, players=players)


def tree_calls(rollout: RolloutSection, judges: int) -> int:
    """The most LLM requests of one tree, without retries; `judges`: those for the scores of one conversation."""
    turns = min(rollout.max_user_turns, rollout.max_assistant_turns - 1) if rollout.first_futures else 0
    return rollout.tree_futures * (turns + judges)


def group_rules(config: RLConfig) -> GroupRules:
    """What the config says about groups."""
    rollout, driver = config.rollout, config.driver
    auto = rollout.num_repeat_rollouts == "auto"
    return GroupRules(
        num_replies=rollout.num_replies,
        num_futures=rollout.first_futures,
        min_replies=rollout.min_replies,
        min_futures=driver.min_futures,
        group_timeout_s=driver.group_timeout_s,
        advantage_eps=config.algorithm.advantage_eps,
        min_group_std=config.algorithm.min_group_std,
        baseline=config.algorithm.baseline,
        scale=config.algorithm.scale,
        overlong_share=config.algorithm.overlong_share,
        overlong_penalty=config.algorithm.overlong_penalty,
        longest=rollout.max_new_tokens,
        equal_replies=rollout.equal_replies,
        tree_baseline=config.algorithm.tree_baseline if config.algorithm.credit == "tree" else None,
        uniform_group_futures=rollout.uniform_group_futures,
        auto=AutoFutures(rollout.most_futures, rollout.tree_futures) if auto else None,
    )
