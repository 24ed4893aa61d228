"""One prompt's conversation tree: n replies, K futures each, all at once; then MR and the group's advantages."""

from __future__ import annotations

from dataclasses import replace

from collab_megatron.algorithms.advantages import group_advantages
from collab_megatron.driver.conversation import Limits, Players, play_future
from collab_megatron.driver.together import together
from collab_megatron.errors import RunError
from collab_megatron.rewards import multiturn_reward
from collab_megatron.types import Generation, Group, Reply, Task, TrainingSample


async def grow_group(
    task: Task,
    *,
    num_replies: int,
    num_futures: int,
    min_replies: int,
    advantage_eps: float,
    min_group_std: float,
    limits: Limits,
    players: Players,
) -> Group:
    """Sample n replies and play every future concurrently; a future starts as soon as its reply is there.

    Raises RunError only when the replies themselves cannot be sampled, and NoEngineLeft; failed futures are statuses.
    num_futures = 0 scores each reply as it stands.
    """
    prompt_ids = players.chat.prompt_ids(task.prompt)
    with players.engine_clock:
        generations = await players.engine.generate(
            prompt_ids,
            n=num_replies,
            temperature=limits.temperature,
            max_new_tokens=limits.max_new_tokens,
            affinity=task.task_id,
        )
    replies = await together(
        _grow_reply(task, prompt_ids, generation, g, num_futures, limits, players)
        for g, generation in enumerate(generations)
    )
    return with_advantages(
        Group(task=task, prompt_ids=tuple(prompt_ids), replies_G=tuple(replies), kept=True),
        min_replies=min_replies,
        eps=advantage_eps,
        min_std=min_group_std,
    )


async def _grow_reply(
    task: Task,
    prompt_ids: list[int],
    generation: Generation,
    reply_index: int,
    num_futures: int,
    limits: Limits,
    players: Players,
) -> Reply:
    simulate = num_futures > 0
    futures = await together(
        play_future(
            task,
            prompt_ids,
            generation,
            index=k,
            sample_index=reply_index * max(num_futures, 1) + k,
            simulate=simulate,
            limits=limits,
            players=players,
        )
        for k in range(max(num_futures, 1))
    )
    text = players.chat.reply_text(generation.token_ids_T)
    return Reply(text=text, generation=generation, futures_K=tuple(futures), mr=multiturn_reward(futures))


def with_advantages(group: Group, *, min_replies: int, eps: float, min_std: float) -> Group:
    """The group with advantages over the replies that have a reward; dropped if fewer than `min_replies` have one.

    Missing is not zero: a reply without a scored future leaves its group instead of pulling the mean down.
    """
    scored = [reply.mr for reply in group.replies_G if reply.mr is not None]
    if len(scored) < max(min_replies, 2):
        return replace(group, kept=False)
    advantages = iter(group_advantages(scored, eps=eps, min_std=min_std))
    replies = tuple(
        reply if reply.mr is None else replace(reply, advantage=next(advantages)) for reply in group.replies_G
    )
    return replace(group, replies_G=replies)


def training_samples(group: Group) -> list[TrainingSample]:
    """The replies the trainer sees; none of a dropped group."""
    if not group.kept:
        return []
    return [
        TrainingSample(
            prompt_ids=group.prompt_ids,
            reply_ids_T=reply.generation.token_ids_T,
            rollout_logprobs_T=reply.generation.logprobs_T,
            versions_T=reply.generation.versions_T,
            advantage=reply.advantage,
        )
        for reply in group.replies_G
        if reply.advantage is not None and reply.generation.token_ids_T
    ]


async def play_once(task: Task, *, limits: Limits, players: Players) -> Reply:
    """One whole conversation from the prompt on, for evaluation: one reply, one future.

    Raises RunError if the first reply cannot be sampled.
    """
    prompt_ids = players.chat.prompt_ids(task.prompt)
    with players.engine_clock:
        (generation,) = await players.engine.generate(
            prompt_ids,
            n=1,
            temperature=limits.temperature,
            max_new_tokens=limits.max_new_tokens,
            affinity=task.task_id,
        )
    if not generation.token_ids_T:
        raise RunError(f"the engine returned an empty reply for task {task.task_id}")
    return await _grow_reply(task, prompt_ids, generation, 0, 1, limits, players)
