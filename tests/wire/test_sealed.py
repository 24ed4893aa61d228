"""Sealed messages: what the other side sent comes through once; nothing else does."""

from __future__ import annotations

import contextlib
import random
import secrets

import pytest

from collab_megatron.errors import UserError
from collab_megatron.wire import job
from collab_megatron.wire.dropped import Dropped
from collab_megatron.wire.sealed import MAX_BODY, Channel, Refused, Side, new_half, read_key

KEY = bytes(range(32))
SESSION = b"agent..." + b"launcher"
INPUTS = 10_000


def channel(side: Side, key: bytes = KEY, session: bytes = SESSION) -> Channel:
    return Channel(key, session, side)


def test_messages_go_both_ways_in_order() -> None:
    agent, launcher = channel("agent"), channel("launcher")
    for number in range(3):
        assert launcher.open(agent.seal(b"up %d" % number)) == b"up %d" % number
        assert agent.open(launcher.seal(b"")) == b""
    whole = secrets.token_bytes(MAX_BODY)
    assert launcher.open(agent.seal(whole)) == whole


def test_a_lost_message_is_no_reason_to_refuse_the_next_one() -> None:
    agent, launcher = channel("agent"), channel("launcher")
    agent.seal(b"lost")
    assert launcher.open(agent.seal(b"next")) == b"next"


@pytest.mark.parametrize(
    "frames, reason",
    [
        (channel("agent", session=b"x" * 16).seal(b"a"), "of another session"),
        (channel("agent", key=bytes(32)).seal(b"a"), "without the job's key"),
        (channel("launcher").seal(b"a"), "without the job's key"),  # our own, sent back
        ([*channel("agent").seal(b"a"), b""], "malformed"),
        ([], "malformed"),
        ([SESSION, b"1", bytes(32), b""], "malformed"),
        ([SESSION, bytes(8), bytes(32), bytes(MAX_BODY + 1)], "malformed"),
    ],
)
def test_strangers_are_refused_with_a_reason(frames: list[bytes], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        channel("launcher").open(frames)


def test_a_message_counts_once_and_an_older_one_not_at_all() -> None:
    agent, launcher = channel("agent"), channel("launcher")
    first, second = agent.seal(b"first"), agent.seal(b"second")
    assert launcher.open(second) == b"second"
    for frames in (second, first):
        with pytest.raises(Refused, match="repeated"):
            launcher.open(frames)


def test_no_changed_message_gets_in() -> None:
    """10,000 inputs: flipped bits, cut and longer frames, exchanged frames, noise."""
    rng = random.Random(1)
    agent, launcher = channel("agent"), channel("launcher")
    reasons = Dropped()
    for number in range(INPUTS):
        frames = agent.seal(rng.randbytes(rng.randrange(1, 80)))
        changed = list(frames)
        place = rng.randrange(4)
        how = number % 5
        if how == 0:
            flipped = bytearray(changed[place])
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            changed[place] = bytes(flipped)
        elif how == 1:
            changed[place] = changed[place][:-1]
        elif how == 2:
            changed[place] += rng.randbytes(rng.randrange(1, 9))
        elif how == 3:
            other = agent.seal(b"other")
            changed[place] = other[place] if other[place] != changed[place] else b""
        else:
            changed = [rng.randbytes(rng.choice([0, 8, 16, 32, 60])) for _ in range(rng.randrange(6))]
        with pytest.raises(Refused) as refused:
            launcher.open(changed)
        reasons[str(refused.value)] += 1
        if number % 100 == 0:  # and the connection goes on
            assert launcher.open(frames) == frames[3]
    assert set(reasons) == {"malformed", "of another session", "without the job's key"}
    assert min(reasons.values()) > INPUTS / 100


def test_bodies_that_are_no_message_are_refused() -> None:
    """10,000 inputs: noise, cut and changed messages, messages of the other side, values outside their limits."""
    rng = random.Random(2)
    start = job.Start("engine-0", 0, ("{python}", "-c", "pass"))
    good = [job.encode(job.Hello("n1", "10.0.0.1", 8, ("0",), "0.3", "b")), job.encode(job.Report((_state(),)))]
    decoded = 0
    for number in range(INPUTS):
        body = bytearray(rng.choice(good))
        if number % 3 == 0:
            body = bytearray(rng.randbytes(rng.randrange(200)))
        elif number % 3 == 1:
            del body[rng.randrange(len(body)) :]
        else:
            for _ in range(rng.randrange(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        with contextlib.suppress(Refused):  # and no other exception
            assert isinstance(job.from_agent(bytes(body)), job.Hello | job.Report)
            decoded += 1
    assert decoded < INPUTS / 2  # some changes are to other values of the same type
    for wrong in (start, job.Bye(), job.Hello("../n1", "a", 1, (), "", ""), job.Hello("n", "a", -1, (), "", "")):
        with pytest.raises(Refused):
            job.from_agent(job.encode(wrong))
    for name in ("a/b", "", ".hidden"):
        with pytest.raises(Refused):
            job.from_launcher(job.encode(job.Welcome("logs", "077", 20, 60, {name: b""})))
    assert job.from_launcher(job.encode(start)) == start


def _state() -> job.RoleState:
    return job.RoleState("engine-0", 1, pid=4711, address="http://10.0.0.1:30000")


def test_a_key_is_64_digits_and_never_in_a_message() -> None:
    assert read_key(KEY.hex() + "\n", "the file") == KEY
    for wrong in ("", KEY.hex()[:-1], "g" * 64, KEY.hex() + "00"):
        with pytest.raises(UserError, match="the file has no key of 64 hexadecimal digits") as error:
            read_key(wrong, "the file")
        assert not wrong or wrong not in str(error.value)
    assert len({new_half() for _ in range(100)}) == 100
