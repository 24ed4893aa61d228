"""Cost estimate before a run: LLM calls, tokens and dollars. Pure, except for LiteLLM's price table.

An upper bound: every conversation runs to its last turn, every answer has `max_tokens`, nothing comes from the journal.
Retries are not included. Lengths of data and prompts are means, with CHARS_PER_TOKEN characters per token. Legend, in
tokens: c the chat before the trained reply, a a policy turn, u a user turn, U number of user turns, p a prompt file, r
the hidden request, d the task's description, g the reference answer.

    user turn j of a future   in  p + d + r + c + j a + (j - 1) u            out  u
    judge                     in  p + r (+ g for accuracy) + c + (U + 1) a + U u    out  its max_tokens

Input dominates, because every user turn and every judge gets the whole chat so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from collab_megatron.config.entry import BuildDatasetConfig, EvaluateConfig, RLConfig
from collab_megatron.config.roles import (
    MODEL_OF,
    PAIR_JUDGE,
    USER_OF,
    as_user,
    compared_metrics,
    role_of_metric,
    role_place,
    shipped_judges,
    user_places,
)
from collab_megatron.config.sections import (
    DeploymentSection,
    LLMSection,
    RewardSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.rollout.llm.prices import price
from collab_megatron.types import Task

CHARS_PER_TOKEN = 4  # of English text with the usual tokenizers; other languages take more tokens


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of the texts of a dataset."""

    chat: float = 0.0  # c: the prompt's messages
    request: float = 0.0  # r
    description: float = 0.0  # d
    reference: float = 0.0  # g


@dataclass(frozen=True)
class Calls:
    """The calls to one LLM role."""

    place: str  # simulators.user, simulators.user.mixture.0, simulators.judge ...
    section: LLMSection
    calls: float = 0.0
    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def times(self, factor: float) -> Calls:
        return Calls(self.place, self.section, self.calls * factor, self.tokens_in * factor, self.tokens_out * factor)

    @property
    def usd(self) -> float | None:
        """Dollars at the most expensive deployment; None if a price is unknown."""
        ways: list[DeploymentSection] = [self.section, *self.section.deployments]
        prices = [price(way) for way in ways]
        known = [item.cost_usd(round(self.tokens_in), round(self.tokens_out)) for item in prices if item is not None]
        return max(known) if len(known) == len(ways) else None


def lengths_of(tasks: Sequence[Task]) -> Lengths:
    """Means over `tasks`; 0 without tasks."""
    count = max(len(tasks), 1) * CHARS_PER_TOKEN
    return Lengths(
        chat=sum(len(message.content) for task in tasks for message in task.prompt) / count,
        request=sum(len(task.single_turn_prompt) for task in tasks) / count,
        description=sum(len(task.task_desc) for task in tasks) / count,
        reference=sum(len(task.ground_truth) for task in tasks) / count,
    )


def step_calls(config: RLConfig, lengths: Lengths) -> list[Calls]:
    """Calls of one training step."""
    rollout = config.rollout
    futures = rollout.prompts_per_step * rollout.tree_futures
    turns = min(rollout.max_user_turns, rollout.max_assistant_turns - 1) if rollout.first_futures else 0
    future = future_calls(config.simulators, config.reward, lengths, turns=turns, reply=rollout.max_new_tokens)
    end = _end(config.simulators, lengths, turns, rollout.max_new_tokens)
    return [item.times(futures) for item in (*future, *_second_judge(config.simulators, config.reward, lengths, end))]


def evaluation_calls(config: RLConfig | EvaluateConfig, lengths: Lengths, tasks: int) -> list[Calls]:
    """Calls of one evaluation of every model on `tasks` held-out tasks, at most `evaluation.num_tasks`."""
    section = config.evaluation
    own = config.simulators if section.mixture else _with_user(config.simulators, config.simulators.user)
    found = _calls_with_user(config, own, lengths)
    for name, user in section.users.items():
        further = _with_user(config.simulators, as_user(user, config.simulators.user.termination_signal))
        place = role_place(f"{USER_OF}{name}")
        calls = _calls_with_user(config, further, lengths)
        found += [replace(item, place=place) if item.place == "simulators.user" else item for item in calls]
    played = min(tasks, section.num_tasks)
    users = 1 + len(section.users)
    if not isinstance(config, EvaluateConfig) or not config.models:
        return [item.times(played) for item in summed(found)]
    whole = [item.times(played * len(config.models)) for item in found]
    for name, row in config.models.items():
        if row.api is not None:
            turns = section.max_assistant_turns
            context = sum(lengths.chat + turn * (row.api.max_tokens + own.user.max_tokens) for turn in range(turns))
            calls_of_row = Calls(role_place(f"{MODEL_OF}{name}"), row.api, turns, context, turns * row.api.max_tokens)
            whole.append(calls_of_row.times(played * users))
    return summed([*whole, *_pair_calls(config, lengths, played, users)])


def _pair_calls(config: EvaluateConfig, lengths: Lengths, played: int, users: int) -> list[Calls]:
    """The judge sees two conversations, in both orders."""
    simulators, compare = config.simulators, config.compare
    role = PAIR_JUDGE if PAIR_JUDGE in simulators.roles else "judge"
    judge = simulators.roles.get(PAIR_JUDGE, simulators.judge)
    if judge is None:
        return []
    turns = config.evaluation.max_assistant_turns
    one = lengths.chat + turns * config.rollout.max_new_tokens + (turns - 1) * simulators.user.max_tokens
    shown = _prompt_tokens("judge_pair", compare.prompt_file) + lengths.request + lengths.reference + 2 * one
    pairs = min(played, compare.judged_pairs) * users * (len(config.models) - 1)
    return [Calls(role_place(role), judge, 1, shown, judge.max_tokens).times(2 * pairs)]


def _calls_with_user(config: RLConfig | EvaluateConfig, simulators: SimulatorsSection, lengths: Lengths) -> list[Calls]:
    """Calls of one held-out conversation with this user."""
    future = future_calls(
        simulators,
        config.reward,
        lengths,
        turns=config.evaluation.max_assistant_turns - 1,
        reply=config.rollout.max_new_tokens,
    )
    return [*future, *_user_turns(simulators, lengths, [0.0])] if config.evaluation.simulated_opening else future


def _with_user(simulators: SimulatorsSection, user: UserSection) -> SimulatorsSection:
    """The simulators with one user alone."""
    return simulators.model_copy(update={"user": user.model_copy(update={"mixture": ()})})


def evaluations(config: RLConfig) -> int:
    """Number of evaluations in the run: before the first step, at every interval, after the last step."""
    if not config.evaluates:
        return 0
    steps, interval = config.train.steps, config.train.eval_interval
    at_intervals = steps // interval if interval else 0
    at_end = 0 if interval and steps % interval == 0 else 1
    return int(config.train.eval_at_start) + at_intervals + at_end


def build_calls(config: BuildDatasetConfig, tasks: Sequence[Task]) -> list[Calls]:
    """Calls of building a dataset from `tasks`: every turn has candidates with futures, and keeps one candidate."""
    simulators = config.simulators
    assert simulators.assistant is not None, "the config's own check"
    lengths, reply = lengths_of(tasks), simulators.assistant.max_tokens
    user = simulators.user.max_tokens
    openings = sum(not task.prompt for task in tasks) / max(len(tasks), 1)
    chat = lengths.chat + openings * user
    found = [item.times(openings) for item in _user_turns(simulators, lengths, [0.0])]
    plays = config.num_candidate_responses * config.num_repeat_rollouts
    for turn in range(config.max_total_turns):
        before = Lengths(chat, lengths.request, lengths.description, lengths.reference)
        plain = config.num_candidate_responses - config.num_proactive_candidates
        if plain:
            found.append(Calls("simulators.assistant", simulators.assistant, 1, chat, plain * reply))
        if config.num_proactive_candidates:
            told = _prompt_tokens("assistant_proactive", config.proactive_prompt_file) + lengths.description
            told += lengths.request + lengths.reference + chat
            proactive = config.num_proactive_candidates * reply
            found.append(Calls("simulators.assistant", simulators.assistant, 1, told, proactive))
        future = future_calls(simulators, config.reward, before, turns=config.max_user_turns, reply=reply)
        found += [item.times(plays) for item in future]
        for number in range(config.max_user_turns):  # the assistant plays the policy in its own futures
            context = chat + (number + 1) * (reply + user)
            found.append(Calls("simulators.assistant", simulators.assistant, 1, context, reply).times(plays))
        if not config.max_user_turns and turn + 1 < config.max_total_turns:
            found += _user_turns(simulators, before, [chat + reply])
        chat += reply + user
    return [item.times(len(tasks)) for item in summed(found)]


def future_calls(
    simulators: SimulatorsSection, reward: RewardSection, lengths: Lengths, *, turns: int, reply: int
) -> list[Calls]:
    """Calls of one future or whole conversation: `turns` user turns, policy turns of `reply` tokens, the judges."""
    user = simulators.user.max_tokens
    chats = [lengths.chat + (turn + 1) * reply + turn * user for turn in range(turns)]
    found = _user_turns(simulators, lengths, chats)
    end = _end(simulators, lengths, turns, reply)
    for metric, (place, section) in judges(reward, simulators).items():
        found.append(Calls(place, section, 1, _shown(metric, section, reward, lengths) + end, section.max_tokens))
    return summed(found)


def _end(simulators: SimulatorsSection, lengths: Lengths, turns: int, reply: int) -> float:
    """Tokens of the chat after the last policy turn."""
    return lengths.chat + (turns + 1) * reply + turns * simulators.user.max_tokens


def _shown(metric: str, section: LLMSection, reward: RewardSection, lengths: Lengths) -> float:
    """Tokens that the judge of a metric reads besides the chat."""
    shown = _prompt_tokens(*_judge_prompt(metric, section, reward))
    if metric != "interactivity" or reward.interactivity_sees == "request":
        shown += lengths.request
    return shown + (lengths.reference if metric == "accuracy" else 0.0)


def _second_judge(simulators: SimulatorsSection, reward: RewardSection, lengths: Lengths, end: float) -> list[Calls]:
    """Calls of the second judge for its share of the futures: it reads what the first judges read, and the opening."""
    second, share = reward.second_judge, reward.second_judge_share
    if second is None:
        return []
    first = judges(reward, simulators)
    compared = compared_metrics(reward, simulators)
    opening = _prompt_tokens("judge_opening", None) + lengths.request + lengths.chat
    tokens_in = opening + sum(_shown(name, first[name][1], reward, lengths) + end for name in compared)
    calls = 1 + len(compared)
    return [Calls("reward.second_judge", second, calls, tokens_in, calls * second.max_tokens).times(share)]


def judges(reward: RewardSection, simulators: SimulatorsSection) -> dict[str, tuple[str, LLMSection]]:
    """Shipped metric -> its judge: (key in the config, section). Calls of user-defined metrics are unknown."""
    return {
        name: (role_place(role_of_metric(name, reward, simulators)), section)
        for name, section in shipped_judges(reward, simulators).items()
        if section is not None
    }


def summed(calls: Iterable[Calls]) -> list[Calls]:
    """One entry per place, in the order of first appearance."""
    total: dict[str, Calls] = {}
    for item in calls:
        held = total.get(item.place, Calls(item.place, item.section))
        total[item.place] = Calls(
            item.place,
            item.section,
            held.calls + item.calls,
            held.tokens_in + item.tokens_in,
            held.tokens_out + item.tokens_out,
        )
    return [item for item in total.values() if item.calls]


def call_lines(heading: str, calls: Sequence[Calls]) -> list[str]:
    """One line per LLM role, under one heading."""
    lines = []
    for item in calls:
        usd = item.usd
        dollars = "price unknown" if usd is None else f"${usd:,.2f}"
        role = item.place.removeprefix("simulators.")
        lines.append(
            f"{heading:<12}at most {round(item.calls):,} calls of {role} to {item.section.model}: "
            f"{_tokens(item.tokens_in)} tokens in, {_tokens(item.tokens_out)} out, {dollars}"
        )
        heading = ""
    return lines


def dollar_lines(parts: Mapping[str, tuple[int, Sequence[Calls]]]) -> list[str]:
    """The total in dollars. parts: name -> (number, the calls of one)."""
    calls = [item.times(count) for count, items in parts.values() for item in items]
    unknown = {item.place: item.section.model for item in calls if item.usd is None}
    known = sum(item.usd or 0.0 for item in calls)
    said = " and ".join(f"{count:,} {what}" for what, (count, _) in parts.items() if count)
    lines = [f"dollars     at most ${known:,.2f} for {said}"]
    if unknown:
        lines[0] += f", without {', '.join(unknown)}"
        for place, model in unknown.items():
            lines.append(
                f"            no price is known for {model}: set {place}.input_usd_per_mtoken and "
                "output_usd_per_mtoken (0 for a free server)"
            )
    return lines


def _user_turns(simulators: SimulatorsSection, lengths: Lengths, chats: Sequence[float]) -> list[Calls]:
    """One user turn after each chat of `chats` tokens; a mixture divides them by weight."""
    parts = user_places(simulators.user)
    weight = sum(part.weight for part in parts.values())
    found = []
    for place, part in parts.items():
        told = _prompt_tokens("user", part.prompt_file) + lengths.description + lengths.request
        shown = sum(chats) + told * len(chats)
        found.append(Calls(place, part, len(chats), shown, len(chats) * part.max_tokens).times(part.weight / weight))
    return found


def _judge_prompt(metric: str, section: LLMSection, reward: RewardSection) -> tuple[str, Path | None]:
    """Name of the shipped prompt, and the file that replaces it, as rewards/registry.py chooses them."""
    own = section.prompt_file if metric in reward.judges else None
    if metric == "accuracy":
        return "judge_accuracy", own or reward.accuracy_prompt_file
    if metric != "interactivity":
        shipped = {"bleu_score": "extract_document", "pass_rate": "extract_code", "judge": "judge_rubric"}
        return shipped[metric], own
    return (
        "judge_interactivity_chat" if reward.interactivity_sees == "chat" else "judge_interactivity",
        section.prompt_file,
    )


def _prompt_tokens(name: str, file: Path | None) -> float:
    """Tokens of the shipped prompt, or of `file`, which the checks have already read."""
    shipped = resources.files("collab_megatron.rollout.llm").joinpath("prompts", f"{name}.txt")
    return len((shipped if file is None else file).read_text("utf-8")) / CHARS_PER_TOKEN


def _tokens(count: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"
