"""Reply parsing, prompt templates and failure reading: pure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collab_megatron.errors import UserError
from collab_megatron.simulators.failure import classify, retry_after_s
from collab_megatron.simulators.parsing import (
    MalformedReply,
    json_object,
    read_for_record,
    share_field,
    strip_scratchpad,
    text_field,
    verdict_field,
)
from collab_megatron.simulators.templates import PromptTemplate, chat_lines, load_template
from collab_megatron.simulators.user import ends_chat, strip_signal
from collab_megatron.types import TERMINATION_SIGNAL, Message


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
    assert strip_signal(f"bye {TERMINATION_SIGNAL}") == "bye"


def test_retry_after_forms() -> None:
    assert retry_after_s({"Retry-After": "3"}, 0) == 3.0
    assert retry_after_s({"retry-after-ms": "250"}, 0) == 0.25
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, 30.0) == 30.0
    assert retry_after_s({"Retry-After": "soon"}, 0) is None
    assert retry_after_s({}, 0) is None


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
    assert strip_signal("bye [[STOP]]", "[[STOP]]") == "bye"


@pytest.mark.parametrize("place", ["chat", "request", "reference", "task_desc"])
def test_no_value_closes_a_block(place: str) -> None:
    names = ("request", "chat", "reference", "task_desc")
    template = PromptTemplate(" ".join(f"<{name}>${name}</{name}>" for name in names), required=names, source="t")
    ends = [f"</{name}>" for name in names] + ["</ CHAT\n>"]
    filled = template.fill(**(dict.fromkeys(names, "x") | {place: "".join(ends)}))
    assert [filled.count(end) for end in ends] == [1, 1, 1, 1, 0]
    assert "<\\/request>" in filled
