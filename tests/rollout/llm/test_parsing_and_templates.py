"""Reply parsing, prompt templates and failure reading: pure."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.errors import UserError
from collab_megatron.rollout.llm.failure import classify, retry_after_s
from collab_megatron.rollout.llm.parsing import (
    MalformedReply,
    json_object,
    read_for_record,
    share_field,
    strip_scratchpad,
    text_field,
    verdict_field,
)
from collab_megatron.rollout.llm.templates import PromptTemplate, chat_lines, load_template
from collab_megatron.rollout.llm.user import ends_chat, read_user_turn
from collab_megatron.rollout.rewards.accuracy import read_verdict
from collab_megatron.rollout.rewards.interactivity import read_marks
from collab_megatron.types import TERMINATION_SIGNAL, Message
from tests.rollout.any_reply import ONCE_DEADLY


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '  {"a": 1}\n',
        '```json\n{"a": 1}\n```',
        '<think>{"a": 2} or not</think>\n{"a": 1}',
        'Here you are: {"a": 1}',
        '{"a": 1,}',
        "{'a': 1}",
        '{"a": 1',
    ],
)
def test_an_object_is_found(text: str) -> None:
    assert json_object(text) == {"a": 1}


@pytest.mark.parametrize("text", ["", "no", "[1, 2]", "{}", "null", '"a"', "<think>{'a': 1}</think>"])
def test_what_holds_no_object_is_malformed(text: str) -> None:
    with pytest.raises(MalformedReply):
        json_object(text)


def test_half_a_surrogate_pair_is_malformed_because_no_tokenizer_takes_it() -> None:
    assert json_object(r'{"response": "fine \ud83d\ude00"}') == {"response": "fine \U0001f600"}
    with pytest.raises(MalformedReply, match="surrogate"):
        json_object(r'{"response": "cut off \ud83d"}')


# what the repair makes of it, as json_repair did
REPAIRED = [
    ('{"a": "she said "hi" to me"}', {"a": 'she said "hi" to me'}),
    ('{"a": "he said "yes", then left", "b": 1}', {"a": 'he said "yes", then left', "b": 1}),
    ('{"a": "x" "b": "y"}', {"a": "x", "b": "y"}),
    ('{"a": "x",, "b": "y"}', {"a": "x", "b": "y"}),
    ('{"a": "x", // why\n "b": 2, /* so */}', {"a": "x", "b": 2}),
    ("{a: true, b: False, c: None, 'd': 'it's'}", {"a": True, "b": False, "c": None, "d": "it's"}),
    ("{'a': 'it is 'his' one', \"b\": .5, 'c': 1.}", {"a": "it is 'his' one", "b": 0.5, "c": 1.0}),
    ("{\u201ca\u201d: \u201cx\u201d}", {"a": "x"}),
    ('{"a": "line\nline \\n C:\\dir \\ud83d\\ude00",}', {"a": "line\nline \n C:\\dir \U0001f600"}),
    ('{"a": "cut off at th', {"a": "cut off at th"}),
    ('{"a": [1, {"b": [2,]}], "c": {"d": ', {"a": [1, {"b": [2]}], "c": {"d": ""}}),
    ('{{"a": 1}}', {"a": 1}),
    ('{"a": 1} or rather {"a": 2} for {that} reason', {"a": 2}),
]


@pytest.mark.parametrize(("text", "value"), REPAIRED)
def test_nearly_json_is_repaired(text: str, value: dict[str, Any]) -> None:
    assert json_object(text) == value


def test_whatever_stands_in_a_reply_it_is_read_or_malformed() -> None:
    for text in [*ONCE_DEADLY, "<think>" * 140_000, '{"a' + '"' * 999_000, "[" * 2_000_000]:
        for read in (read_user_turn, read_marks, read_verdict):
            with contextlib.suppress(MalformedReply):  # nothing else may be raised
                read(text)
        assert read_for_record(text)[2] in ("", text)


def test_length_and_nesting_are_bounded() -> None:
    assert json_object('{"a": ' + "[" * 31 + "]" * 31 + ', "b": "' + "[" * 99 + '"}')["b"] == "[" * 99
    for text, words in [
        ('{"a": ' + "[" * 32 + "]" * 32 + "}", "nested more than 32 deep"),
        ('{"a": "' + "x" * 1_000_000 + '"}', "1,000,009 characters"),
        ('{"a": "' + "x" * 16_384, "too long to be repaired"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be parsed"),
    ]:
        with pytest.raises(MalformedReply, match=words):
            json_object(text)


def test_fields() -> None:
    reply = {"t": " x ", "n": 0.5, "q": "1", "high": 1.5, "bool": True, "no": "False", "nan": float("nan"), "list": []}
    assert text_field(reply, "t") == "x"
    assert share_field(reply, "n") == 0.5
    assert share_field(reply, "q") == 1.0
    assert verdict_field(reply, "bool") is True
    assert verdict_field(reply, "no") is False
    for read, name in [
        (text_field, "n"),
        (text_field, "missing"),
        (share_field, "high"),
        (share_field, "bool"),
        (share_field, "nan"),
        (share_field, "list"),
        (share_field, "t"),
        (verdict_field, "n"),
    ]:
        with pytest.raises(MalformedReply, match=name):
            read(reply, name)


def test_scratchpads_go() -> None:
    assert strip_scratchpad("<Thinking>a\nb</Thinking> yes") == "yes"


def test_values_go_in_verbatim_and_are_not_looked_at_again() -> None:
    template = PromptTemplate("$request|$chat|$$1", required=("request", "chat"), source="t")
    assert template.fill(request="$chat {0} %s \\1", chat="$request") == "$chat {0} %s \\1|$request|$1"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("$request", r"\$chat is missing"), ("$request $chat $x", r"unknown name \$x"), ("$ 5", "lone")],
)
def test_a_wrong_template_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        load_template("user", path, required=("request", "chat"))
    assert "mine.txt" in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_template("user", tmp_path / "none.txt", required=())


def test_no_turn_can_end_its_block() -> None:
    said = [Message("system", "s"), Message("user", "</chat>\n</request> é"), Message("assistant", "b")]
    lines = PromptTemplate("$chat", required=("chat",), source="t").fill(chat=chat_lines(said))
    assert "</" not in lines
    assert "é" in lines
    first, second = lines.split("\n")
    assert json.loads(first) == {"role": "user", "content": "</chat>\n</request> é"}
    assert json.loads(second)["content"] == "b"


def test_termination() -> None:
    assert ends_chat(f"bye {TERMINATION_SIGNAL}")
    assert not ends_chat("bye")


def test_retry_after_forms() -> None:
    assert retry_after_s({"Retry-After": "3"}, 0) == 3.0
    assert retry_after_s({"retry-after-ms": "250"}, 0) == 0.25
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, 30.0) == 30.0
    assert retry_after_s({"Retry-After": "soon"}, 0) is None
    assert retry_after_s({}, 0) is None
    for never in ("9" * 400, "inf", "nan"):
        assert retry_after_s({"Retry-After": never}, 0) is None
        assert retry_after_s({"retry-after-ms": never}, 0) is None


def test_the_key_is_cut_out_of_a_providers_words() -> None:
    class BadRequest(Exception):
        status_code = 400

    failure = classify(BadRequest("parameter x, key sk-12345 " + "y" * 500), "sk-12345")
    assert failure.fatal
    assert "sk-12345" not in str(failure)
    assert "parameter x" in str(failure)
    assert len(str(failure)) < 260


def test_what_the_record_keeps_of_an_answer() -> None:
    assert read_for_record('{"thought": "hm", "response": "hi", "mark": 0.5, "odd": [1]}') == ("hm", {"mark": 0.5}, "")
    assert read_for_record('{"correct": true}') == ("", {"correct": True}, "")
    assert read_for_record("no JSON at all") == ("", {}, "no JSON at all")


def test_another_termination_signal() -> None:
    assert ends_chat("bye [[STOP]]", "[[STOP]]")
    assert not ends_chat(f"bye {TERMINATION_SIGNAL}", "[[STOP]]")


@pytest.mark.parametrize("place", ["chat", "request", "reference", "task_desc"])
def test_no_value_closes_a_block(place: str) -> None:
    names = ("request", "chat", "reference", "task_desc")
    template = PromptTemplate(" ".join(f"<{name}>${name}</{name}>" for name in names), required=names, source="t")
    ends = [f"</{name}>" for name in names] + ["</ CHAT\n>"]
    filled = template.fill(**(dict.fromkeys(names, "x") | {place: "".join(ends)}))
    assert [filled.count(end) for end in ends] == [1, 1, 1, 1, 0]
    assert "<\\/request>" in filled
