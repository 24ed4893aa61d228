"""The rule-based roles: what the user reveals, what the judge counts, how passive the assistant is."""

from __future__ import annotations

import json
import random

import pytest

from collab_megatron.demo import desk, desk_users, scripted_roles
from collab_megatron.types import TERMINATION_SIGNAL

TASK = desk.DeskTask(
    intent="RIDE",
    slots={"from": "harbor", "to": "zoo", "time": "6pm"},
    missing=("from", "time"),
    opening="send me a taxi to the zoo",
    request="i would like a taxi from the harbor to the zoo at 6pm",
    command="RIDE from harbor to zoo time 6pm",
)


def prompt(chat: list[tuple[str, str]], request: str = TASK.request) -> list[dict[str, str]]:
    lines = "\n".join(json.dumps({"role": role, "content": content}) for role, content in chat)
    blocks = f"<request>\n{request}\n</request>\n<chat>\n{lines}\n</chat>"
    text = f"Instructions that mention <chat> and {{braces}}.\n{blocks}\nGo."
    return [{"role": "user", "content": text}]


def ask(model: str, messages: list[dict[str, str]], **options: object) -> list[str]:
    return scripted_roles.answer({"model": model, "messages": messages, **options})


def user(chat: list[tuple[str, str]], **options: object) -> str:
    return json.loads(ask("desk-user", prompt(chat), **options)[0])["response"]


def judge(*assistant: str, opening: str = TASK.opening) -> float:
    chat = [("user", opening)]
    for text in assistant:
        chat += [("assistant", text), ("user", "at 6pm")]
    verdict = json.loads(ask("desk-judge", prompt(chat))[0])
    return (verdict["understanding"] + verdict["clarification"] + verdict["suggestion"]) / 3


@pytest.mark.parametrize("asked", [("time",), ("from", "time"), ("to",), ("time", "size")])
def test_user_reveals_what_is_asked_and_nothing_else(asked):
    for seed in range(20):
        said = user([("user", TASK.opening), ("assistant", desk.question_text(asked))], seed=seed)
        own = {slot: TASK.slots[slot] for slot in asked if slot in TASK.slots}
        assert desk.find_values(said, "RIDE") == own
        assert said.split()[0] not in own.values()  # a bare value would be another token


def test_user_ends_the_chat_after_a_command():
    assert user([("user", TASK.opening), ("assistant", TASK.command)]) == "that is right [TERMINATE]"
    wrong = TASK.command.replace("6pm", "7am")
    assert user([("user", TASK.opening), ("assistant", wrong)]) == "that is not right [TERMINATE]"


def test_a_turn_may_hold_any_line_end():
    chat = [{"role": "user", "content": f"{TASK.opening}\u2028now"}, {"role": "assistant", "content": TASK.command}]
    lines = "\n".join(json.dumps(turn, ensure_ascii=False) for turn in chat)
    text = f"<request>\n{TASK.request}\n</request>\n<chat>\n{lines}\n</chat>"
    (said,) = ask("desk-user", [{"role": "user", "content": text}])
    assert json.loads(said)["response"] == "that is right [TERMINATE]"


def test_user_gives_up_after_the_second_fruitless_turn():
    chat = [("user", TASK.opening), ("assistant", "well well")]
    first = user(chat)
    assert TERMINATION_SIGNAL not in first
    second = user([*chat, ("user", first), ("assistant", "which size?")])
    assert TERMINATION_SIGNAL in second


def test_user_opens_an_empty_chat_vaguely_in_three_of_five():
    openings = [user([], seed=seed) for seed in range(2000)]
    assert all(desk.find_intent(opening) == "RIDE" for opening in openings)
    vague = sum(bool(desk.find_missing(opening, "RIDE")) for opening in openings)
    assert abs(vague / 2000 - desk_users.AMBIGUOUS_SHARE) < 0.05


def test_judge_multiplies_recall_and_precision():
    assert judge("which from and time?", TASK.command) == 1.0
    assert judge("which time?", TASK.command) == 0.5
    assert judge("which from and to and time?") == pytest.approx(2 / 3)
    assert judge("which time?", "which from?") == 1.0
    assert judge("which from and time?", "which time?") == pytest.approx(2 / 3)
    assert judge("which from and time?", "hm") == pytest.approx(2 / 3)
    assert judge(TASK.command) == 0.0
    assert judge("which?") == 0.0


def test_judge_of_a_complete_opening_wants_no_question():
    assert judge(TASK.command, opening=TASK.request) == 1.0
    assert judge("which time?", TASK.command, opening=TASK.request) == 0.0


def better(first: list[tuple[str, str]], second: list[tuple[str, str]]) -> str:
    blocks = [f"Compare <first> and <second>.\n<request>\n{TASK.request}\n</request>"]
    for tag, chat in (("first", first), ("second", second)):
        lines = "\n".join(json.dumps({"role": role, "content": content}) for role, content in chat)
        blocks.append(f"<{tag}>\n{lines}\n</{tag}>")
    return json.loads(ask("desk-judge", [{"role": "user", "content": "\n".join(blocks)}])[0])["better"]


def test_judge_of_two_chats_prefers_the_right_command_then_the_marks():
    guessed = [("user", TASK.opening), ("assistant", TASK.command.replace("6pm", "7am"))]
    lucky = [("user", TASK.opening), ("assistant", TASK.command)]
    asked = [("user", TASK.opening), ("assistant", "which from and time?"), ("user", "x"), ("assistant", TASK.command)]
    assert (better(lucky, guessed), better(guessed, lucky)) == ("first", "second")
    assert (better(asked, lucky), better(lucky, asked)) == ("first", "second")
    assert better(asked, asked) == "neither"


def assistant(opening: str, **options: object) -> list[str]:
    return ask("desk-assistant", [{"role": "user", "content": opening}], **options)


@pytest.mark.parametrize(
    ("opening", "rate"),
    [
        (TASK.opening, scripted_roles.ASK_RATE_OFTEN),
        ("send me a taxi from the harbor to the zoo", scripted_roles.ASK_RATE_SELDOM),
        (TASK.request, scripted_roles.ASK_RATE_NEEDLESS),
    ],
)
def test_assistant_asks_at_its_rates_and_for_the_right_slots(opening, rate):
    replies = [reply for seed in range(40) for reply in assistant(opening, n=100, seed=seed)]
    questions = [reply for reply in replies if isinstance(desk.parse_reply(reply), desk.Question)]
    assert abs(len(questions) / len(replies) - rate) < 0.035
    missing = desk.find_missing(opening, "RIDE")
    if missing:
        assert set(questions) == {desk.question_text(missing)}
    commands = set(replies) - set(questions)
    assert all(desk.parse_reply(reply) == desk.Command(reply) for reply in commands)
    assert len(commands) > 1 or not missing  # guesses vary


def test_assistant_is_right_once_told():
    messages = [{"role": "system", "content": "any"}, {"role": "user", "content": TASK.opening}]
    messages += [{"role": "assistant", "content": "which from and time?"}]
    rng = random.Random(1)
    for _ in range(20):
        told = desk.render_answer(rng, TASK.slots, TASK.missing)
        assert ask("desk-assistant", [*messages, {"role": "user", "content": told}], n=3) == [TASK.command] * 3


def test_temperature_zero_ignores_the_seed_and_above_it_the_wording_varies():
    chat = [("user", TASK.opening), ("assistant", "which from and time?")]
    assert len({user(chat, seed=seed, temperature=0) for seed in range(20)}) == 1
    assert len({user(chat, seed=seed, temperature=1.0) for seed in range(20)}) > 1
    assert user(chat, seed=3) == user(chat, seed=3)
    assert len(set(assistant(TASK.opening, n=20, temperature=0))) == 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"model": "desk-user", "messages": []}, "not empty"),
        ({"model": "desk-user", "messages": [{"role": "user", "content": "hi"}]}, "<request>"),
        ({"model": "desk-user", "messages": prompt([("user", "hi")])}, "end with an assistant turn"),
        ({"model": "desk-user", "messages": prompt([], request="i would like a taxi")}, "leaves out"),
        ({"model": "desk-judge", "messages": prompt([])}, "begin with the user's opening"),
        ({"model": "desk-assistant", "messages": [{"role": "user", "content": "hi"}]}, "names none of"),
        ({"model": "desk-assistant", "messages": [{"role": "user", "content": TASK.opening}], "n": 0}, "n is 0"),
        ({"model": "desk-assistant", "messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]"),
    ],
)
def test_malformed_requests_say_what_is_wrong(request_, words):
    with pytest.raises(ValueError, match=words):
        scripted_roles.answer(request_)
