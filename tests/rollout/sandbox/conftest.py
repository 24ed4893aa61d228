from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest

from tests.rollout.sandbox.programs import processes_of


@pytest.fixture
def mark() -> Iterator[str]:
    """A text that stands in the command line of a program and of all its forks; none of them may outlive the test."""
    name = f"mark-{uuid.uuid4().hex}"
    yield name
    end = time.monotonic() + 5
    while (left := processes_of(name)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left
