"""The manners of the desk's further users: bare values, a forgotten answer, one change of mind."""

from __future__ import annotations

import json
import random

import pytest

from collab_megatron.demo import desk, scripted_roles
from collab_megatron.demo.tokenizer import build_tokenizer

TASK = desk.DeskTask(
    intent="RIDE",
    slots={"from": "harbor", "to": "zoo", "time": "6pm"},
    missing=("time",),
    opening="send me a taxi from the harbor to the zoo",
    request="i would like a taxi from the harbor to the zoo at 6pm",
    command="RIDE from harbor to zoo time 6pm",
)
NO_TIME = [("user", TASK.opening), ("assistant", "which time?")]


def said(model: str, chat: list[tuple[str, str]], request: str = TASK.request, **options: object) -> str:
    lines = "\n".join(json.dumps({"role": role, "content": content}) for role, content in chat)
    text = f"<request>\n{request}\n</request>\n<chat>\n{lines}\n</chat>"
    asked = {"model": model, "messages": [{"role": "user", "content": text}], **options}
    return json.loads(scripted_roles.answer(asked)[0])["response"]


def listens(user: str, task: desk.DeskTask, seed: int) -> tuple[str, int]:
    """An assistant that asks for what is missing and uses the newest value; its last reply, and how many it gave."""
    chat, replies = [("user", task.opening)], 0
    while replies < 5:
        known = desk.find_values(" ".join(text for role, text in chat if role == "user"), task.intent)
        missing = [slot for slot in task.slots if slot not in known]
        reply = desk.question_text(missing) if missing else desk.command_text(task.intent, known)
        chat.append(("assistant", reply))
        replies += 1
        words = said(user, chat, task.request, seed=seed)
        if "[TERMINATE]" in words:
            break
        chat.append(("user", words))
    return reply, replies


def test_a_bare_answer_is_the_value_alone() -> None:
    assert said("desk-user-bare", NO_TIME) == "6pm"
    both = [("user", "send me a taxi to the zoo"), ("assistant", "which from and time?")]
    assert said("desk-user-bare", both) == "harbor and 6pm"
    assert (
        said("desk-user-bare", [*NO_TIME, ("user", "6pm"), ("assistant", TASK.command)]) == "that is right [TERMINATE]"
    )


def test_the_terse_user_answers_one_of_two_questions() -> None:
    chat = [("user", "send me a taxi to the zoo"), ("assistant", "which from and time?")]
    assert said("desk-user-terse", chat) == "harbor"
    assert said("desk-user-terse", [*chat, ("user", "harbor"), ("assistant", "which time?")]) == "6pm"


@pytest.mark.parametrize("seed", range(5))
def test_the_terse_user_changes_its_mind_once(seed: int) -> None:
    first = said("desk-user-terse", NO_TIME, seed=seed)
    assert first in desk.SLOT_VALUES["time"]
    assert first != "6pm"
    acted = [*NO_TIME, ("user", first), ("assistant", TASK.command.replace("6pm", first))]
    second = said("desk-user-terse", acted, seed=seed)
    assert second == "no it is 6pm"
    chat = [*acted, ("user", second), ("assistant", TASK.command)]
    assert said("desk-user-terse", chat, seed=seed) == "ok [TERMINATE]"
    stubborn = [*acted, ("user", second), ("assistant", TASK.command.replace("6pm", first))]
    assert said("desk-user-terse", stubborn, seed=seed) == "wrong [TERMINATE]"
    again = [*NO_TIME, ("user", first), ("assistant", "which time?")]
    assert said("desk-user-terse", again, seed=seed) == "6pm"


def test_a_guess_and_a_complete_opening_end_the_terse_users_chat() -> None:
    guessed = [("user", TASK.opening), ("assistant", TASK.command.replace("6pm", "7am"))]
    assert said("desk-user-terse", guessed) == "wrong [TERMINATE]"
    assert said("desk-user-terse", [("user", TASK.request), ("assistant", TASK.command)]) == "ok [TERMINATE]"


@pytest.mark.parametrize("user", ["desk-user", "desk-user-bare", "desk-user-terse"])
def test_an_assistant_that_listens_is_right_within_three_replies(user: str) -> None:
    rng = random.Random(5)
    for seed in range(300):
        task = desk.sample_task(rng, "heldout")
        reply, replies = listens(user, task, seed)
        assert (reply, replies <= 3) == (task.command, True), task


def test_the_tokenizer_knows_all_their_words() -> None:
    tokenizer, rng = build_tokenizer(), random.Random(6)
    texts = ["ok [TERMINATE]", "wrong [TERMINATE]"]
    for _ in range(300):
        task = desk.sample_task(rng, "train")
        texts += [desk.render_bare_answer(task.slots, list(task.slots)[:2])]
        texts += [text for value in task.slots.values() for text in (value, desk.render_correction(value))]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text
