"""The demo's figures depend on the sampled tasks: shares, splits and guessing odds are tested, not assumed."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest

from collab_megatron.demo import desk
from collab_megatron.demo.task_files import draw_tasks

COUNT = 20_000


@pytest.fixture(scope="module")
def tasks() -> list[desk.DeskTask]:
    rng = random.Random(7)
    return [desk.sample_task(rng, "train") for _ in range(COUNT)]


def within(hits: int, count: int, share: float) -> bool:
    """Whether `hits` of `count` lies within four standard errors of `share`."""
    return abs(hits / count - share) < 4 * math.sqrt(share * (1 - share) / count)


def test_share_of_ambiguous_openings_is_the_share_asked_for(tasks):
    assert within(sum(task.ambiguous for task in tasks), COUNT, 0.6)
    for share in (0.0, 0.25, 1.0):
        rng = random.Random(1)
        drawn = [desk.sample_task(rng, "heldout", share).ambiguous for _ in range(4000)]
        assert sum(drawn) == share * 4000 if share in (0.0, 1.0) else within(sum(drawn), 4000, share)


def test_share_survives_the_removal_of_repeated_openings():
    drawn = draw_tasks(random.Random(3), "heldout", 8000)
    assert len({task.opening for task in drawn}) == 8000
    assert within(sum(task.ambiguous for task in drawn), 8000, 0.6)


def test_openings_leave_out_exactly_what_missing_says(tasks):
    for task in tasks[:5000]:
        assert desk.find_intent(task.opening) == task.intent
        assert desk.find_missing(task.opening, task.intent) == task.missing
        assert desk.read_request(task.request) == (task.intent, dict(task.slots))


def test_one_or_two_slots_are_missing_and_every_slot_is_at_times(tasks):
    numbers = Counter(len(task.missing) for task in tasks if len(task.slots) > 2 and task.ambiguous)
    assert set(numbers) == {1, 2}
    assert within(numbers[2], sum(numbers.values()), desk.TWO_MISSING_SHARE)
    assert {len(task.missing) for task in tasks if task.intent == "REMIND"} == {0, 1}
    seen = {(task.intent, slot) for task in tasks for slot in task.missing}
    assert seen == {(intent, slot) for intent, slots in desk.INTENT_SLOTS.items() for slot in slots}


def test_openings_vary(tasks):
    vague = Counter(task.opening for task in tasks if task.ambiguous)
    assert vague.most_common(1)[0][1] < 10
    assert len({task.opening for task in tasks}) > 0.85 * COUNT


def test_splits_share_no_combination():
    combinations = {}
    for split in desk.SPLITS:
        rng = random.Random(5)
        combinations[split] = {desk.sample_task(rng, split).command for _ in range(5000)}
    assert not combinations["train"] & combinations["heldout"]


def test_a_guess_is_right_at_most_once_in_eight():
    assert all(8 <= len(set(values)) <= 10 for values in desk.SLOT_VALUES.values())
    rng = random.Random(11)
    vague = [desk.sample_task(rng, "heldout", 1.0) for _ in range(8000)]
    right = 0
    for task in vague:
        guess = {**task.slots, **{slot: rng.choice(desk.SLOT_VALUES[slot]) for slot in task.missing}}
        right += desk.command_text(task.intent, guess) == task.command
    assert right / len(vague) < 1 / 8


def test_every_word_has_one_meaning():
    values = [value for values in desk.SLOT_VALUES.values() for value in values]
    assert len(values) == len(set(values))
    wordings = [wording for group in desk.SLOT_WORDINGS.values() for wording in group]
    texts = [
        *wordings,
        *desk.GREETINGS,
        *desk.CLOSINGS,
        *(p for group in desk.INTENT_PHRASES.values() for p in group),
    ]
    words = set(re.findall(r"[a-z0-9]+", " ".join(texts)))
    assert not words & set(values)
    assert not any(wording.startswith("{}") for wording in wordings)
    for intent, phrases in desk.INTENT_PHRASES.items():
        assert all(desk.find_intent(phrase) == intent for phrase in phrases)
    assert not set(desk.INTENT_NOUNS) & set(re.findall(r"[a-z]+", " ".join(wordings)))


def test_slots_of_an_intent_share_no_telling_word():
    for slots in desk.INTENT_SLOTS.values():
        words = [{*" ".join(desk.SLOT_WORDINGS[slot]).split()} - {"{}", "the"} for slot in slots]
        assert sum(map(len, words)) == len(set.union(*words))


def test_parse_reply_tells_commands_questions_and_the_rest():
    assert desk.parse_reply("BOOK size 4 time 6pm") == desk.Command("BOOK size 4 time 6pm")
    assert desk.parse_reply("which time and day?") == desk.Question(("time", "day"))
    assert desk.parse_reply("which?") == desk.Question(())
    assert desk.parse_reply("book it") is None
    assert desk.parse_reply("") is None


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        desk.sample_task(random.Random(0), "test")
    with pytest.raises(ValueError, match="names none of"):
        desk.find_intent("tell me a joke")
    with pytest.raises(ValueError, match="leaves out day"):
        desk.read_request("set a reminder about the taxes")
