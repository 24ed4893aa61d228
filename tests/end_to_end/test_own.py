"""docs/own.md: every block of the page is used as it is written. No policy is trained here."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from collab_megatron.config import RLConfig, load_config
from collab_megatron.config.sections import UserSection
from collab_megatron.data.parquet import read_tasks
from collab_megatron.launch.ports import free_port
from collab_megatron.rollout.llm import Gateway
from collab_megatron.rollout.llm.health import SimulatorHealth
from collab_megatron.rollout.llm.user import LLMUserSimulator, user_simulator
from collab_megatron.rollout.rewards import make_scorer
from collab_megatron.types import LLMRequest, Message, ScoredConversation, T, Task
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONGEST = 30  # lines of a block
PORT = free_port()  # in place of the page's
TASK = Task(
    "t", (Message("user", "Book me a table."),), "Book a table for two at noon on Monday.", "BOOK 2 monday noon"
)


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall((REPOSITORY / "docs" / "own.md").read_text()) if found == kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder in which the page has been followed up to its commands."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tools").symlink_to(REPOSITORY / "tools")
    shutil.copytree(tiny_model, folder / "my_model")
    (folder / "conf").mkdir()
    (folder / "conf" / "mine.yaml").write_text(blocks("yaml")[0].replace("18480", str(PORT)))
    (folder / "tasks.jsonl").write_text(blocks("json")[0])
    server, metric = blocks("python")
    (folder / "impatient.py").write_text(server.replace("18480", str(PORT)))
    (folder / "conf" / "my_metrics.py").write_text(metric)
    (folder / "conf" / "impatient.txt").write_text(blocks("text")[0])
    return folder


def run(place: Path, command: str) -> str:
    """Output of a command of the page."""
    program, *argv = shlex.split(command)
    assert program == "python"
    env = {**os.environ, "OPENAI_API_KEY": "any-key", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *argv], cwd=place, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_block_is_long() -> None:
    found = BLOCK.findall((REPOSITORY / "docs" / "own.md").read_text())
    assert len(found) >= 9
    assert max(len(text.splitlines()) for _, text in found) <= LONGEST


def test_the_commands_before_a_run(place: Path) -> None:
    """Data, then the checks of a start, on a stand-in for a GPU node."""
    dry_run, prepare, rescore = (block.strip() for block in blocks(""))
    run(place, prepare)
    assert [len(read_tasks(place / "data" / f"rl_{name}.parquet")) for name in ("train", "validation")] == [1, 1]
    said = run(place, dry_run)
    assert "accuracy" in said
    assert "one_question" in said
    assert rescore.startswith("python -m collab_megatron.rescore conf/mine.yaml --record ")


@contextmanager
def served(place: Path) -> Iterator[None]:
    with (place / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "impatient.py"], cwd=place, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", PORT), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (place / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait(20)


def test_the_user_that_is_a_program(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through LiteLLM over HTTP, with the shipped prompt; it counts its own turns in the chat."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("OPENAI_API_KEY", "any-key")
    config = load_config(RLConfig, place / "conf" / "mine.yaml")
    chat = [*TASK.prompt, Message("assistant", "For which day?")]

    async def turns() -> list[str]:
        found = []
        gateway = Gateway({"user": config.simulators.user}, 1)
        user = user_simulator(config.simulators, gateway, SimulatorHealth(config.simulators.health))
        for number in range(3):
            found.append(await user.reply(TASK, chat, sample_index=number))
            chat.extend((Message("user", found[-1]), Message("assistant", "For which day?")))
        return found

    with served(place):
        assert asyncio.run(turns()) == ["Shorter!", "Shorter!", "[TERMINATE]"]


class Recorded:
    """A ChatLLM that keeps the request."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        self.prompts.append(request.messages[-1].content)
        return [request.parse('{"thought": "hurry", "response": "noon"}')]


def test_the_prompt_of_a_user(place: Path) -> None:
    section = yaml.safe_load(blocks("yaml")[1])["simulators"]["user"]
    section["prompt_file"] = place / "conf" / section["prompt_file"]
    llm = Recorded()
    said = asyncio.run(
        LLMUserSimulator(UserSection.model_validate(section), llm).reply(TASK, TASK.prompt, sample_index=0)
    )
    assert said == "noon"
    assert f"You want this: {TASK.single_turn_prompt}\n" in llm.prompts[0]
    assert json.dumps(TASK.prompt[0].content) in llm.prompts[0]


def test_the_metric(place: Path) -> None:
    scorer = make_scorer({"one_question": 1.0}, judge=None, metric_modules=[str(place / "conf" / "my_metrics.py")])
    for reply, score in (("For which day?", 1.0), ("Day? Time?", 0.0)):
        talk = ScoredConversation(TASK, (*TASK.prompt, Message("assistant", reply)), 1, 5)
        assert asyncio.run(scorer.score(talk)) == {"one_question": score}


CHECK = """
import torch
from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.loss.losses import policy_loss
mask = torch.ones(1, 2)
logprobs = torch.tensor([[-0.5, -1.5]], requires_grad=True)
found = policy_loss(
    logprobs, old_logprobs=-mask, rollout_logprobs=-mask, ref_logprobs=None, advantages=2 * mask, mask=mask,
    algorithm=AlgorithmSection(policy_loss="unclipped", kl_coef=0.0),
)
(gradient,) = torch.autograd.grad(found.loss, logprobs)
torch.testing.assert_close(gradient, -2 * (logprobs.detach() + 1).exp())
"""


def test_the_algorithm(place: Path) -> None:
    """The patch applies to the package, and the new loss has the gradient -ratio * advantage."""
    copy = place / "copy"
    shutil.copytree(
        REPOSITORY / "collab_megatron", copy / "collab_megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "mine.diff").write_text(blocks("diff")[0])
    subprocess.run(["git", "apply", "mine.diff"], cwd=copy, check=True)
    env = {**os.environ, "PYTHONPATH": str(copy)}
    subprocess.run([sys.executable, "-c", CHECK], cwd=copy, env=env, check=True, timeout=120)
