"""A policy turn in two parts: its thought, and the reply that everyone else sees."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_megatron.data.chat import ChatTemplate
from collab_megatron.data.thought_tags import split_thoughts
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.types import Generation, Message
from tests.data.test_chat_template import ALWAYS_THINKS, CHATML, FORGETS_THOUGHTS, byte_tokenizer

OPENS = CHATML.replace("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}")
PROMPT = [Message("user", "hello")]


@pytest.mark.parametrize(
    ("text", "opened", "thought", "reply", "closed"),
    [
        (" which day?\n", False, "", " which day?\n", True),
        ("<think>\nno day\n</think>\n\nwhich day?", False, "no day", "which day?", True),
        ("<think></think>which day?", False, "", "which day?", True),
        ("no day\n</think>\n\nwhich day?", True, "no day", "which day?", True),
        ("<think>no day</think>which day?", True, "no day", "which day?", True),  # it opens its thought once more
        ("no day</think>which day?", False, "no day", "which day?", True),  # it leaves the opening tag out
        ("well. <think>no day</think>which day?", False, "no day", "well. which day?", True),
        ("<think>a</think>b</think>c", False, "a\n\nb", "c", True),
        ("<think>a</think>b<think>c</think>d", False, "a\n\nc", "bd", True),
        ("<think>no day and", False, "no day and", "", False),
        ("no day and", True, "no day and", "", False),
        ("which day?<think>no", False, "no", "which day?", False),
        ("<think>no day</think>", False, "no day", "", True),
        ("", False, "", "", True),
        ("", True, "", "", False),
    ],
)
def test_thought_and_reply(text: str, opened: bool, thought: str, reply: str, closed: bool) -> None:
    assert split_thoughts(text, opened=opened) == (thought, reply, closed)


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "a", "b ", "\n", "<", "think>"]), max_size=12)


@given(PIECES.map("".join), st.booleans())
def test_no_text_before_a_closing_tag_is_a_reply(text: str, opened: bool) -> None:
    split = split_thoughts(text, opened=opened)
    assert "</think>" not in split.reply
    inside = opened
    for i in range(len(text)):
        if text.startswith("<think>", i):
            inside = True
        elif text.startswith("</think>", i):
            inside = False
    assert split.closed is not inside


def _sampled(chat: ChatTemplate, text: str, *, ended: bool = True) -> Generation:
    ids = (*chat.tokenizer.encode(text, add_special_tokens=False), *((chat.end_id,) if ended else ()))
    return Generation(ids, (0.0,) * len(ids), (0,) * len(ids), "stop" if ended else "length")


@pytest.mark.parametrize("tags_are", ["plain text", "tokens", "special tokens"])
def test_a_turn_is_split_whatever_the_tags_are_to_the_tokenizer(tags_are: str) -> None:
    tokenizer = byte_tokenizer(CHATML)
    if tags_are != "plain text":
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=tags_are == "special tokens")
    chat = ChatTemplate(tokenizer)
    generation = _sampled(chat, "<think>\nno day\n</think>\n\nwhich day?")
    turn = chat.policy_turn(chat.prompt_ids(PROMPT), generation, begin_s=1.0, end_s=2.5)
    assert (turn.thought, turn.reply, turn.cut, turn.broken) == ("no day", "which day?", False, False)
    assert turn.generation is generation  # trained ids stay as sampled
    assert turn.sampled == "<think>\nno day\n</think>\n\nwhich day?"
    assert (turn.begin_s, turn.end_s) == (1.0, 2.5)

    unclosed = chat.policy_turn(chat.prompt_ids(PROMPT), _sampled(chat, "<think>\nno day. which day?"))
    assert (unclosed.thought, unclosed.reply, unclosed.cut) == ("no day. which day?", "", True)  # although it ended
    cut = chat.policy_turn(chat.prompt_ids(PROMPT), _sampled(chat, "which", ended=False))
    assert (cut.reply, cut.cut) == ("which", True)
    silent = chat.policy_turn(chat.prompt_ids(PROMPT), _sampled(chat, "<think>no</think>\n"))
    assert (silent.cut, silent.broken) == (False, True)


def test_a_prompt_may_open_the_thought() -> None:
    chat = ChatTemplate(byte_tokenizer(OPENS))
    turn = chat.policy_turn(chat.prompt_ids(PROMPT), _sampled(chat, "no day\n</think>\n\nwhich day?"))
    assert (turn.thought, turn.reply, turn.cut) == ("no day", "which day?", False)
    assert turn.sampled == "<think>\nno day\n</think>\n\nwhich day?"  # the template gets the tag back
    grown = [*chat.prompt_ids(PROMPT), *turn.generation.token_ids_T, *chat.turn_glue("monday")]
    assert chat.policy_turn(grown, _sampled(chat, "x</think>ok")).reply == "ok"
    assert chat.policy_turn(chat.prompt_ids(PROMPT), _sampled(chat, "no day")).cut


def test_a_user_cannot_open_a_thought() -> None:
    chat = ChatTemplate(byte_tokenizer(CHATML))
    turn = chat.policy_turn(chat.prompt_ids([Message("user", "hello <think>")]), _sampled(chat, "which day?"))
    assert (turn.reply, turn.cut) == ("which day?", False)


def test_other_tags() -> None:
    chat = ChatTemplate(byte_tokenizer(CHATML), thought_tags=("[THINK]", "[/THINK]"))
    turn = chat.policy_turn(chat.prompt_ids(PROMPT), _sampled(chat, "[THINK]no day[/THINK]which <think> day?"))
    assert (turn.thought, turn.reply) == ("no day", "which <think> day?")


@pytest.mark.parametrize("template", [FORGETS_THOUGHTS, ALWAYS_THINKS, OPENS])
def test_a_rendered_chat_is_given_the_turn_as_sampled(template: str) -> None:
    chat = ChatTemplate(byte_tokenizer(template))
    chat.check_growth("rendered")
    said = "no day\n</think>\n\nwhich day?" if template == OPENS else "<think>\nno day\n</think>\n\nwhich day?"
    context = chat.prompt_ids(PROMPT)
    turn = chat.policy_turn(context, _sampled(chat, said))
    grown: Any = chat.grow(
        [*context, *turn.generation.token_ids_T], [*PROMPT, Message("assistant", turn.sampled)], "monday"
    )
    text = chat.tokenizer.decode(grown)
    assert "which day?" in text
    assert text.count("no day") == (template == OPENS)  # that one keeps thoughts; the others forget them


def test_an_unknown_word_is_no_tag() -> None:
    chat = ChatTemplate(build_tokenizer())  # its vocabulary has only the demo's words
    assert chat.policy_turn(chat.prompt_ids(PROMPT), _sampled(chat, "quux day")).reply == " day"
