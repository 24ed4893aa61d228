"""No password in a URL reaches a terminal, a log or a record."""

from __future__ import annotations

import io
import logging
import pickle
import subprocess
import sys

import pytest

from collab_megatron.errors import RunError, UserError, masked
from collab_megatron.log import _Formatter
from collab_megatron.rollout.llm.failure import DETAIL_CHARS, SimulatorError, classify

SECRET = "Ge-h3im!"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://us:{}@host:8000/v1", "http://***@host:8000/v1"),
        ("'https://{}@host'", "'https://***@host'"),
        ("http://us:a@{}@host/v1", "http://***@host/v1"),
        ("http://us:a/{}@host/v1", "http://***@host/v1"),
        ("http://us:a?b#{}@host/v1", "http://***@host/v1"),
        ("http://h1:1/v1,http://us:{}@h2,http://h3/x", "http://h1:1/v1,http://***@h2,http://h3/x"),
        ("postgres+x://us:{}@h/db", "postgres+x://***@h/db"),
        ("got ['http://us:{0}@h', \"http://us:{0}@i\"]", "got ['http://***@h', \"http://***@i\"]"),
        ("http://host/v1?api_key={}&x=1", "http://host/v1?api_key=***&x=1"),
        ("http://host/v1?x=1&subscription-key={}", "http://host/v1?x=1&subscription-key=***"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, shown: str) -> None:
    assert masked(text.format(SECRET)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "mail someone@example.org",
        "http://127.0.0.1:8000/v1/a@b is refused",
        "see http://host/v1, then ask a@b",
        "http://host:8000 of a@b",
        "engine-0 (http://host:8000) is ready",
        "http://host/v1?max_tokens=3&monkey=1",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert masked(text) == text


def test_our_errors_are_masked_wherever_their_text_goes() -> None:
    url = f"http://us:{SECRET}@host/v1"
    for error in (UserError(f"no {url}"), RunError(f"no {url}"), SimulatorError(f"no {url}")):
        assert str(error) == "no http://***@host/v1"
        assert SECRET not in repr(pickle.loads(pickle.dumps(error)))


def test_a_providers_words_are_masked_before_they_are_cut() -> None:
    class NotFoundError(Exception):
        status_code = 404

    filler = "x" * (DETAIL_CHARS - len("http://us:") - 3)
    failure = classify(NotFoundError(f"{filler}http://us:{SECRET}@host/v1"), secrets=())
    assert SECRET[:3] not in failure.detail


def test_log_lines_and_their_tracebacks_are_masked() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter("driver-0"))
    logger = logging.Logger("collab_megatron.rollout")
    logger.addHandler(handler)
    try:
        raise OSError(f"cannot connect to http://us:{SECRET}@host")
    except OSError:
        logger.exception("a call of %s failed", f"http://us:{SECRET}@host/v1")
    assert "http://***@host/v1 failed" in stream.getvalue()
    assert "cannot connect to http://***@host" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_an_unexpected_errors_traceback_is_masked() -> None:
    code = (
        "import sys; from collab_megatron.errors import run_cli\n"
        "def main(): raise KeyError('http://us:' + sys.argv[1] + '@host')\n"
        "run_cli(main)"
    )
    done = subprocess.run([sys.executable, "-c", code, SECRET], capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError: 'http://***@host'" in done.stderr
    assert SECRET not in done.stderr


RANK = """
import atexit, sys, threading, time
from collab_megatron.errors import BudgetSpent, run_rank
import torch.distributed as dist

def busy(store):
    while True:
        store.check(["a key"])  # native code that lets go of the GIL, as a collective does

def main():
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    threading.Thread(target=busy, args=(store,), daemon=True).start()
    atexit.register(print, "exit handlers ran")
    time.sleep(0.1)
    {ends}

run_rank(main)
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("raise BudgetSpent('spent')", 3, "error: spent\n"),
        ("raise KeyError('http://us:secret@host')", 1, "KeyError: 'http://***@host'"),
        ("return", 0, ""),
    ],
)
@pytest.mark.slow
def test_a_rank_leaves_with_its_exit_code_while_a_thread_is_in_native_code(ends: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", RANK.replace("{ends}", ends)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "exit handlers ran\n"), done.stderr
    assert said in done.stderr
    assert "terminate called" not in done.stderr
