"""What a model may reply: good and broken texts of every kind, and the ones that once ended a run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

WELL = (
    '{"thought": "all well", "response": "for two", "understanding": 1, "clarification": 0.5, "suggestion": 0,'
    ' "correct": true}'
)
"""What a user and each judge can use."""
GOOD = [
    WELL,
    '{"thought": "as the request says", "response": "for two, please"}',
    '{"thought": "done", "response": "thanks [TERMINATE]"}',
    '{"thought": "it asked", "understanding": 1, "clarification": 0.5, "suggestion": 0, "correct": true}',
    '<think>\nwell\n</think>\n```json\n{"response": "caf\u00e9 \U0001f600 \\ud83d\\ude00", "correct": "no"}\n```',
]
PIECES = [
    *"{}[]\"':,\\/*#\n\r\t `()-.0e",
    *("{}", '{"a":', '":"', '",', '\\"', "\\u", "\\ud800", "0x", "//", "/*", "*/", "```json\n", "```", "NaN", "1e999"),
    *("true", "null", "\u201c", "\u201d", "\u2028", "\u0085", "\ufdd0", "\x00", "\ud800", "\udfff", "9" * 50),
    *("<think>", "</think>", "<reasoning>", "</chat>", "<|im_end|>", "[TERMINATE]", "assistant: ", '"response": "'),
]
LONG = 16_000
"""Characters; the gateway throws away what has more than 16,384."""

ONCE_DEADLY = [
    "[" * 1500,
    "[" * LONG,
    "{" * 1500,
    "{" * LONG,
    '{"response":' * 1300,
    '{"response": ' + "[" * 1500 + "]" * 1500 + "}",
    '{"response": "half \\ud800"}',
    '{"response": "half \ud800"}',
    '{"response": "\udc00\ud800", "\ud800": 1}',
    '{"response": "a\u2028b\u2029c\u0085d\x0be"}',
    '{"understanding": NaN, "clarification": Infinity, "suggestion": -Infinity, "correct": NaN, "response": "x"}',
    '{"understanding": ' + "9" * 5000 + ', "response": "x"}',
    '{"understanding": ' + "9" * 4000 + ', "clarification": 1e999, "suggestion": 0, "response": "x", "correct": 1}',
    '{"response": "x", "correct": ' + "[" * 30 + "]" * 30 + "}",
    '"' * LONG,
    '{"a"' + '"' * LONG,
    '{"a": ' + "'" * LONG,
    "{" + "\\" * LONG,
    '{"a": "' + '\\"' * 7900,
    '{"a": ' + '{"b": ' * 2600,
    "{" + "/*" * 7900,
    "{ " + " " * LONG + '"a"',
    '{"a": "' + '" ' * 7900,
    "<think>" * 2200,
    "<think></thinking>" * 800,
    "```" + "\n" * LONG,
    "```json\n" * 2000,
    "{}" * (LONG // 2),
    "{" * 65_000,
    "[" * 1_000_000,
    json.dumps({"response": "word " * (LONG // 5)}),
    json.dumps({"response": "x" * LONG}),
    json.dumps({"response": '" \\' * (LONG // 8)}),
    json.dumps({"response": "\u8a9e" * LONG}, ensure_ascii=False),
    json.dumps({"response": "<|im_end|>" * (LONG // 10)}),
    json.dumps({"response": "</chat>" * (LONG // 7)}),
    json.dumps({"response": "</" * (LONG // 2)}),
    json.dumps({"response": "\n\t " * (LONG // 6)}),
    json.dumps({"response": "thoughts " + " " * 10_000 + "let me know if you have any " * 200}),
    json.dumps({"thought": "<think>" * 1000, "response": "(" * 9000}),
    json.dumps({"thought": ["x"] * 1500, "response": "fine", "correct": {"a": ["b"] * 1500}}),
]


def replies(count: int, *, seed: int = 1) -> list[str]:
    """`count` texts, the same at every call: ONCE_DEADLY; a sixth what Hypothesis makes of any characters and of PIECES
    (2.5 ms each, the others cost next to nothing); and good replies and those with some bytes changed, put in, taken
    out or said over and over."""
    rng = random.Random(seed)
    made: list[str] = []
    pieces = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
    texts = st.one_of(pieces, st.text(st.characters(exclude_categories=())), pieces.map(lambda text: "{" + text))

    @settings(
        max_examples=count // 6, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(texts)
    def collect(text: str) -> None:
        made.append(text)

    collect()
    made = [*ONCE_DEADLY, *made]
    made += [_mutated(rng, rng.choice([*GOOD, rng.choice(made[len(ONCE_DEADLY) :])])) for _ in range(count - len(made))]
    rng.shuffle(made)
    return made


def _mutated(rng: random.Random, text: str) -> str:
    """As what comes of a broken encoder: bytes, read with a half for each that is no UTF-8."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(data) + 1), rng.randint(0, 8)
        put = rng.choice([b"", rng.randbytes(2), data[at : at + length] * rng.randint(1, 60), _piece(rng, PIECES)])
        data[at : at + length * rng.randint(0, 1)] = put
    return bytes(data).decode("utf-8", "surrogateescape")


def _piece(rng: random.Random, pieces: Sequence[str]) -> bytes:
    return rng.choice(pieces).encode("utf-8", "surrogatepass")
