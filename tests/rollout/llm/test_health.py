"""Simulator health: what each check finds and leaves alone, the counts, the limits."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_megatron.config.sections import HealthSection, LLMSection, SimulatorSection, UserSection
from collab_megatron.demo import desk, scripted_roles
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm import Gateway, LLMUserSimulator
from collab_megatron.rollout.llm.health import SimulatorHealth, shares, verdict
from collab_megatron.rollout.llm.templates import load_template
from collab_megatron.rollout.llm.turn_checks import DETECTORS, Turn
from collab_megatron.rollout.llm.user import USER_TURN_SCHEMA
from collab_megatron.rollout.rewards.accuracy import VERDICT_SCHEMA
from collab_megatron.rollout.rewards.interactivity import MARKS_SCHEMA
from collab_megatron.types import TERMINATION_SIGNAL, LLMRequest, Message, T, Task

USER = UserSection(model="m", api_key_env=None)
LETTER = Task(
    "letter",
    (Message("user", "can you help me write a letter to my landlord"),),
    "Write a letter to my landlord, Mrs Okafor, in which I ask her to have the broken heating in the kitchen repaired "
    "before the end of November, politely but firmly, and to name two dates on which the plumber could come.",
    "Dear Mrs Okafor, the heating in the kitchen has been broken since last week. Please have it repaired before the "
    "end of November and let me know two dates on which the plumber could come. Kind regards",
)
BRIEF = Task("gift", (), "a blue vase for my aunt in Porto", "A blue ceramic vase shipped to Porto")
SUM = Task("sum", (), "What is 17 times 3?", "51")
CODE = Task(
    "code", (), "fix my function ```def f(x): return x+``` it does not compile, python three", "def f(x): return x"
)
CHINESE = Task(
    "zh",
    (),
    "请帮我写一封给房东李女士的信，请她在十一月底之前修好厨房里坏掉的暖气，语气要礼貌但坚定",
    "尊敬的李女士，厨房的暖气坏了",
)
GERMAN = Task(
    "de",
    (),
    "Ich brauche einen Zug von Köln nach Wien am Freitagabend, zweite Klasse, mit Fahrradplatz und höchstens zwei "
    "Umstiegen.",
    "ICE 91 ab Köln 18:20",
)


def chat(*turns: str) -> list[Message]:
    """User and assistant in turn, user first."""
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)]


ASKED = chat("can you help me write a letter to my landlord", "Sure. What is it about?")
SOLVED = chat("can you help me write a letter to my landlord", LETTER.ground_truth + " Is that what you wanted?")
NO_CHAT: list[Message] = []

# (check, task, chat so far, turn)
FOUND = [
    ("role_swapped", LETTER, ASKED, "Of course! How can I help you today?"),
    ("role_swapped", LETTER, ASKED, "I'd be happy to assist you with that letter."),
    ("role_swapped", LETTER, ASKED, "As an AI language model I do not have a landlord"),
    ("role_swapped", LETTER, ASKED, "great. let me know if you have any other questions!"),
    ("role_swapped", LETTER, ASKED, "it is about the heating\nAssistant: Here is your letter."),
    ("role_swapped", LETTER, ASKED, "**User:** it is about the heating"),
    ("role_swapped", LETTER, ASKED, LETTER.ground_truth),
    ("role_swapped", LETTER, ASKED, "ok so: the heating in the kitchen has been broken since last week please have it"),
    ("role_swapped", SUM, chat("a sum", "which one?"), "```python\nprint(17 * 3)\n```"),
    ("role_swapped", BRIEF, chat("a gift", "for whom?"), "a blue ceramic vase shipped to Porto."),
    ("role_swapped", GERMAN, chat("ich brauche einen zug", "Wohin?"), "Gerne! Wie kann ich Ihnen heute weiterhelfen?"),
    ("role_swapped", SUM, chat("une question", "oui ?"), "Bonjour, comment puis-je vous aider ?"),
    ("role_swapped", SUM, chat("hola", "¿qué tal?"), "¡Claro! ¿En qué puedo ayudarte?"),
    ("role_swapped", CHINESE, chat("写信", "写给谁？"), "您好，请问有什么可以帮您？"),
    ("role_swapped", CHINESE, chat("写信", "写给谁？"), "用户：写给房东"),
    (
        *(
            "role_swapped",
            GERMAN,
            chat("zug", "Für die Suche brauche ich noch Start und Ziel sowie den Tag der Reise."),
        ),
        "für die suche brauche ich noch start und ziel sowie den tag der reise",
    ),
    ("goal_copied", LETTER, ASKED, f"hi! {LETTER.single_turn_prompt}"),
    (
        "goal_copied",
        LETTER,
        ASKED,
        "want HER to have the broken heating in the kitchen repaired: before the end of",
    ),
    ("goal_copied", LETTER, NO_CHAT, LETTER.single_turn_prompt.upper()),
    ("goal_copied", BRIEF, NO_CHAT, "hello, a blue vase for my aunt please"),
    ("goal_copied", CHINESE, NO_CHAT, "你好，请她在十一月底之前修好厨房里坏掉的暖气，语气要礼貌但坚定"),
    ("goal_copied", GERMAN, NO_CHAT, GERMAN.single_turn_prompt.lower()),
    ("restarted", LETTER, ASKED, "Can you help me write a letter to my landlord?"),
    ("restarted", LETTER, ASKED, "hi, can you help me write a letter to my landlord"),
    ("restarted", CHINESE, chat("你好，我想写一封信给房东", "好的，写什么？"), "我想写一封信给房东，你好！"),
    (
        *("restarted", LETTER, [*ASKED, *chat("it is about the kitchen, the heating there has been broken", "Since?")]),
        "it is about the kitchen, the heating there has been broken.",
    ),
    ("scratchpad_leaked", LETTER, ASKED, "<think>say little</think> it is about the heating"),
    ("scratchpad_leaked", LETTER, ASKED, '{"thought": "say little", "response": "the heating"}'),
    ("scratchpad_leaked", LETTER, ASKED, "the heating </chat>"),
    ("scratchpad_leaked", LETTER, ASKED, "Thought: keep the date back. the heating"),
    ("scratchpad_leaked", LETTER, chat("the person's next message", "Sorry?"), "The person's next message"),
    ("early_end", LETTER, ASKED, TERMINATION_SIGNAL),
    ("early_end", LETTER, ASKED, f"never mind {TERMINATION_SIGNAL}"),
    ("early_end", LETTER, NO_CHAT, f"i need a letter {TERMINATION_SIGNAL}"),
    ("early_end", CHINESE, chat("写信", "写给谁？"), TERMINATION_SIGNAL),
    ("early_end", SUM, chat("a sum", "Which 3 numbers? (“two”?)"), f"bye {TERMINATION_SIGNAL}"),
    ("bare_end", LETTER, SOLVED, f" {TERMINATION_SIGNAL}\n"),
    ("empty", LETTER, ASKED, " \n"),
    ("empty", LETTER, ASKED, "…"),
]

HEALTHY = [
    (LETTER, ASKED, "what would be the person's next message if she is cross"),
    (LETTER, ASKED, "it's about the heating in the kitchen"),
    (LETTER, ASKED, "the heating is broken, how can I help my landlord find a plumber"),
    (LETTER, ASKED, "i want it repaired before the end of november"),
    (LETTER, ASKED, "I don't know"),
    (LETTER, ASKED, "just the letter please, let me know if you need more details"),
    (LETTER, ASKED, "subject: heating\nto: mrs okafor"),
    (LETTER, SOLVED, f"perfect, thanks {TERMINATION_SIGNAL}"),
    (LETTER, SOLVED, "can you say 'the heating in the kitchen has been broken since last week' more politely"),
    (LETTER, chat("a letter", "Done. Is there anything else?"), f"no {TERMINATION_SIGNAL}"),
    (LETTER, chat("a letter", " ".join(["This is the letter."] * 12) + " Shall I go on?"), f"no {TERMINATION_SIGNAL}"),
    (LETTER, [*ASKED, *chat("i don't know", "Since when?")], "i don't know"),
    (LETTER, [*ASKED, *chat("no", "Really?")], "no"),
    (SUM, chat("a sum", "17 * 3 is 51. Right?"), f"yes {TERMINATION_SIGNAL}"),
    (SUM, chat("a sum", "which one?"), "What is 17 times 3?"),
    (SUM, chat("a sum", "is it 50?"), "no, 51 i think"),
    (CODE, chat("code", "show me"), "here ```def f(x): return x+```"),
    (CODE, chat("<think> is a tag", "it is"), "how do i remove <think> from a text"),
    (BRIEF, NO_CHAT, "i need a gift for my aunt"),
    (CHINESE, chat("写信", "写给谁？"), "写给房东，暖气坏了"),
    (CHINESE, chat("写信", "写给谁？"), "李女士"),
    (GERMAN, chat("zug", "Wohin?"), "von köln nach wien, am freitagabend"),
    (
        *(LETTER, chat("a letter", f"You want: {LETTER.single_turn_prompt} Right?")),
        "yes, ask her to have the broken heating in the kitchen repaired before the end of November",
    ),
]


def odd(task: Task, before: list[Message], text: str) -> list[str]:
    turn = Turn.of(task, before, text)
    return [name for name, found in DETECTORS.items() if found(turn)]


@pytest.mark.parametrize(("check", "task", "before", "text"), FOUND)
def test_what_a_check_finds(check: str, task: Task, before: list[Message], text: str) -> None:
    assert check in odd(task, before, text)


@pytest.mark.parametrize(("task", "before", "text"), HEALTHY)
def test_what_the_checks_leave_alone(task: Task, before: list[Message], text: str) -> None:
    assert odd(task, before, text) == []


def test_the_bar_of_a_copied_request() -> None:
    words = [f"word{i}" for i in range(30)]
    for length, bar in ((30, 12), (20, 12), (10, 6), (7, 5)):
        task = Task("t", (), " ".join(words[:length]), "")
        assert odd(task, NO_CHAT, " ".join(words[1:bar])) == []
        assert odd(task, NO_CHAT, " ".join(words[1 : bar + 1])) == ["goal_copied"]
    short = Task("t", (), " ".join(words[:6]), "")
    assert odd(short, NO_CHAT, short.single_turn_prompt) == []


TEXT = st.text(max_size=80) | st.sampled_from(["```", ":", "?", TERMINATION_SIGNAL, "<think>", "how can i help you"])


@given(TEXT, TEXT, TEXT, st.lists(TEXT, max_size=4))
def test_no_text_is_too_odd(request: str, truth: str, text: str, turns: list[str]) -> None:
    health = SimulatorHealth(HealthSection(min_replies=1))
    health.observe_turn("user", Task("t", (), request, truth), chat(*turns), text)
    health.verdict()
    assert all(len(shown) <= 200 and shown.isprintable() for texts in health.examples().values() for shown in texts)


def test_the_demos_simulator_is_healthy() -> None:
    """Every phrase of the demo comes from a short list, requests included: chance copies must stay rare."""
    rng = random.Random(7)
    health = SimulatorHealth(HealthSection())
    template = load_template("user", None, required=(), optional=("task_desc", "request", "chat", "termination_signal"))
    for _ in range(400):
        task = desk.sample_task(rng, "train")
        known = Task("t", (Message("user", task.opening),), task.request, task.command)
        talk = list(known.prompt)
        for _ in range(3):
            wire = [(message.role, message.content) for message in talk]
            talk.append(Message("assistant", scripted_roles.assistant_reply(wire, rng)))
            lines = "\n".join(json.dumps(m.as_dict()) for m in talk)
            prompt = template.fill(task_desc="", request=task.request, chat=lines, termination_signal="")
            said = json.loads(scripted_roles.user_reply([("user", prompt)], rng))["response"]
            health.observe_turn("user", known, talk, said)
            if TERMINATION_SIGNAL in said:
                break
            talk.append(Message("user", said))
    warnings, stop = health.verdict()
    assert (warnings, stop) == ([], None)
    counts = health.metrics()
    assert counts["health/user/turns"] > 400
    assert all(counts.get(f"health/user/{name}", 0) == 0 for name in DETECTORS if name != "goal_copied")
    assert shares(counts)["health/goal_copied_share"] < 0.02


def test_counts_are_sums_and_shares_are_derived() -> None:
    first, second = SimulatorHealth(HealthSection()), SimulatorHealth(HealthSection())
    for health, bad in ((first, 1), (second, 3)):
        for i in range(4):
            health.provider("user", "m", "")
            health.observe_turn("user", LETTER, ASKED, "How can I help you?" if i < bad else "the heating")
        health.provider("judge", "m", "")
        health.malformed("judge", "unreadable")
    parts = [first.metrics(), second.metrics()]
    assert shares(parts[0])["health/role_swapped_share"] == 0.25
    assert parts[0]["health/user/replies"] == parts[0]["health/user/turns"] == 4
    assert "health/judge/role_swapped" not in parts[0]
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    merged = {**total, **shares(total)}
    assert merged["health/user/role_swapped"] == 4
    assert merged["health/role_swapped_share"] == 0.5
    assert merged["health/unreadable_share"] == 2 / 10
    again = first.metrics()
    assert again["health/user/turns"] == again["health/user/role_swapped"] == 0
    assert "health/role_swapped_share" not in shares(again)  # a share of nothing is not 0


def test_a_model_that_changes() -> None:
    health = SimulatorHealth(HealthSection(min_replies=1))
    for model, fingerprint in (("m-1", "a"), ("m-1", "b"), ("m-2", "a"), ("", ""), ("m-1", "a")):
        health.provider("user", model, fingerprint)
    health.provider("judge", "j", "z")  # another role's first model is its own
    health.provider("judge", "azure/j", "y", 1)  # and another deployment's
    counts = health.metrics()
    assert counts["health/user/model_changed"] == counts["health/user/fingerprint_changed"] == 1
    assert counts["health/judge/model_changed"] == counts["health/judge/fingerprint_changed"] == 0
    warnings, _ = verdict(counts, HealthSection(min_replies=1))
    assert len(warnings) == 1
    assert "another model" in warnings[0]
    assert "user 1 of 5" in warnings[0]
    assert health.examples()["model_changed"] == ("user: m-2 instead of m-1",)
    health.provider("user", "m-2", "a")  # the first one of the run stays the measure
    assert health.metrics()["health/user/model_changed"] == 1


def counted(turns: int, swapped: int) -> dict[str, float]:
    return {"health/user/turns": turns, "health/user/role_swapped": swapped}


@pytest.mark.parametrize(
    ("turns", "swapped", "limits", "warned", "stopped"),
    [
        (100, 5, {}, False, False),
        (100, 6, {}, True, False),
        (49, 49, {"stop": {"role_swapped": 0.0}}, False, False),  # too few to say
        (100, 6, {"warn": {"role_swapped": 0.5}}, False, False),
        (100, 1, {"warn": {"role_swapped": 0.0}}, True, False),
        (100, 60, {"stop": {"role_swapped": 0.5}}, True, True),
        (100, 60, {"stop": {"role_swapped": 0.5}, "warn": {"role_swapped": 1.0}}, False, True),
        (20, 20, {"min_replies": 10, "stop": {"early_end": 0.1}}, True, False),
    ],
)
def test_limits(turns: int, swapped: int, limits: dict[str, Any], warned: bool, stopped: bool) -> None:
    warnings, stop = verdict(counted(turns, swapped), HealthSection(**limits))
    assert bool(warnings) is warned
    assert (stop is not None) is stopped
    for sentence in (*warnings, *filter(None, [stop])):
        assert "role_swapped" in sentence
        assert f"user {swapped} of {turns}" in sentence
    if stop:
        assert "simulators.health.stop.role_swapped=0.5" in stop


def test_a_limit_of_an_unknown_check() -> None:
    for limits in ({"warn": {"role_swaped": 0.1}}, {"stop": {"role_swaped": 0.1}}):
        with pytest.raises(UserError, match=r"simulators\.health\.\w+: .*'role_swaped'.*role_swapped, goal_copied"):
            SimulatorHealth(HealthSection(**limits))
    with pytest.raises(ValueError, match="wrong_role"):
        SimulatorHealth(HealthSection()).malformed("user", "odd")


def test_examples_are_few_and_short() -> None:
    health = SimulatorHealth(HealthSection())
    for i in range(5):
        health.observe_turn("user", LETTER, ASKED, f"{i} how can i help you\x1b[31m\n" + "x" * 500)
    kept = health.examples()["role_swapped"]
    assert [text[0] for text in kept] == ["0", "1", "2"]
    assert all(len(text) == 200 and text.isprintable() and text.endswith("…") for text in kept)
    assert health.examples() == {}


def test_accepted_turns_are_looked_at(endpoint: Any) -> None:
    """Through the real gateway: a malformed reply is not a turn, the one after it is."""
    endpoint.script = ["nonsense", json.dumps({"thought": "", "response": "How can I help you?"})]
    health = SimulatorHealth(HealthSection())
    config = LLMSection(model="hosted_vllm/m", api_base=endpoint.url, api_key_env=None, timeout_s=5.0)

    async def main() -> str:
        gateway = Gateway({"user": config}, 1)
        try:
            return await LLMUserSimulator(USER, gateway.role("user"), health=health).reply(
                LETTER, ASKED, sample_index=0
            )
        finally:
            await gateway.close()

    said = asyncio.run(main())
    counts = health.metrics()
    assert counts["health/user/turns"] == counts["health/user/role_swapped"] == 1
    assert health.examples()["role_swapped"] == (said,)


class Echo:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        self.asked.append((request.messages[0].content.splitlines()[0], request.schema))
        return [request.parse('{"thought": "", "response": "ok"}')]


def test_each_part_of_a_mixture_has_its_prompt(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("my own words\n$request $chat")
    llm = Echo()
    other = SimulatorSection(model="b", prompt_file=mine)
    both = UserSection(model="a", mixture=(other,))
    simulator = LLMUserSimulator(both, llm, part=lambda sample_index: sample_index % 2)
    for sample_index in (0, 1, 2):
        asyncio.run(simulator.reply(SUM, [], sample_index=sample_index))
    firsts = [first for first, _ in llm.asked]
    assert firsts[1] == "my own words"
    assert firsts[0] == firsts[2] != firsts[1]
    asyncio.run(LLMUserSimulator(UserSection(model="a", prompt_file=mine), llm).reply(SUM, [], sample_index=0))
    assert llm.asked[-1] == ("my own words", USER_TURN_SCHEMA)
    missing = SimulatorSection(model="b", prompt_file=tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read"):
        LLMUserSimulator(UserSection(model="a", mixture=(missing,)), llm)


@pytest.mark.parametrize(
    ("name", "schema"),
    [("user", USER_TURN_SCHEMA), ("judge_accuracy", VERDICT_SCHEMA), ("judge_interactivity", MARKS_SCHEMA)],
)
def test_schema_and_shipped_prompt_name_the_same_fields(name: str, schema: dict[str, Any]) -> None:
    known = ("task_desc", "request", "chat", "reference", "termination_signal")
    prompt = load_template(name, None, required=(), optional=known).fill(**dict.fromkeys(known, ""))
    (shown,) = (json.loads(line) for line in prompt.splitlines() if line.startswith("{"))
    kinds = {str: "string", float: "number", bool: "boolean"}
    assert {field: kinds[type(value)] for field, value in shown.items()} == {
        field: kind["type"] for field, kind in schema["properties"].items()
    }
    assert list(schema["properties"]) == schema["required"] == list(shown)


def test_the_placeholder_is_that_of_the_shipped_prompt() -> None:
    prompt = load_template("user", None, required=("request", "chat"), optional=("task_desc", "termination_signal"))
    filled = prompt.fill(request="", chat="", task_desc="", termination_signal=TERMINATION_SIGNAL)
    example = next(line for line in filled.splitlines() if line.startswith('{"thought"'))
    assert DETECTORS["scratchpad_leaked"](Turn.of(LETTER, ASKED, json.loads(example)["response"]))


def test_an_end_by_another_signal_is_an_end() -> None:
    health = SimulatorHealth(HealthSection())
    health.observe_turn("user", LETTER, SOLVED, " [[STOP]]", signal="[[STOP]]")
    assert health.metrics()["health/user/bare_end"] == 1
