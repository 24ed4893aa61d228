"""The key of a request in the journal depends on its content alone, and stays the same over versions."""

from __future__ import annotations

import math

import pytest

from collab_megatron.config.sections import LLMSection
from collab_megatron.rollout.llm.litellm_api import ApiRequest
from collab_megatron.rollout.llm.role_client import request_seed
from collab_megatron.rollout.llm.role_journal import reply_key, request_key
from collab_megatron.types import LLMRequest, Message

MESSAGES = [{"role": "user", "content": "hi"}]
PARAMETERS = {"temperature": 1.0, "seed": 3, "n": 1}


def test_a_key_depends_on_all_of_the_request_and_on_no_order_of_names() -> None:
    same = reply_key("m", MESSAGES, PARAMETERS, 0)
    assert len(same) == 16
    assert reply_key("m", [{"content": "hi", "role": "user"}], dict(reversed(PARAMETERS.items())), 0) == same
    others = [
        reply_key("n", MESSAGES, PARAMETERS, 0),
        reply_key("m", [{"role": "user", "content": "hi "}], PARAMETERS, 0),
        reply_key("m", [*MESSAGES, *MESSAGES], PARAMETERS, 0),
        reply_key("m", MESSAGES, {**PARAMETERS, "seed": 4}, 0),
        reply_key("m", MESSAGES, {**PARAMETERS, "response_format": {"type": "json_object"}}, 0),
        reply_key("m", MESSAGES, PARAMETERS, 1),
        reply_key("m", [{"role": "user", "content": "\ud800"}], PARAMETERS, 0),
    ]
    assert len({same, *others}) == 8


def test_a_key_is_the_same_on_every_day() -> None:
    """A change of this would make every journal useless."""
    assert reply_key("m", MESSAGES, PARAMETERS, 0).hex() == "a5429ce238415d9059db47d83c070e84"


def test_what_json_lacks_has_no_key() -> None:
    with pytest.raises(ValueError):
        reply_key("m", MESSAGES, {"temperature": math.nan}, 0)


def test_the_key_of_a_whole_request_is_that_of_older_journals() -> None:
    asked = LLMRequest([Message("user", "hi é")], str, sample_index=3, n=2, json_reply=True, schema={"type": "object"})
    keys = []
    for response_format in ("json_schema", "json_object"):
        section = LLMSection.model_validate(
            {"model": "m", "extra": {"top_p": 0.5}, "response_format": response_format, "max_tokens": 77}
        )
        request = ApiRequest(asked, section, n=2, seed=request_seed(1, asked, 4), temperature=0.5)
        keys.append(request_key("m", request).hex())
    assert keys == ["1969894944050cb5a63b42e0058f3d56", "7e1b3ca773a133c7ce8b933da82841e3"]
