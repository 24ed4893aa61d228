"""The miniatures of the paper's tasks: their items, their rule-based roles, and conversations that these grow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import BuildDatasetConfig, load_config
from collab_megatron.config.sections import SimulatorsSection
from collab_megatron.data_engine.grow import BuildPlayers, GrowthRules, grow_conversation
from collab_megatron.data_engine.proactive import ProactivePrompt
from collab_megatron.data_engine.problems import Problem, read_problems
from collab_megatron.demo import mini_roles
from collab_megatron.demo.mini_roles import QUESTION, learn_items, sentences
from collab_megatron.demo.scripted_roles import answer
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm.user import LLMUserSimulator
from collab_megatron.rollout.rewards import make_scorer
from collab_megatron.types import TERMINATION_SIGNAL, LLMRequest, Message, T
from tests.conftest import REPOSITORY

MINI = REPOSITORY / "conf" / "mini"
TASKS = ("math", "medium", "bigcodebench")
FEWEST = 40


@pytest.fixture(autouse=True)
def _items() -> Iterator[None]:
    learn_items(MINI)
    yield
    mini_roles._ITEMS.clear()


def problems_of(task: str) -> list[Problem]:
    return read_problems(load_config(BuildDatasetConfig, MINI / f"{task}_data.yaml", ["tokenizer=null"])).chosen


class Role:
    """A role of the endpoint as an LLM, without HTTP."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        messages = [message.as_dict() for message in request.messages]
        asked = {"model": self.name, "messages": messages, "n": request.n, "seed": request.sample_index}
        return [request.parse(text) for text in answer(asked)]


def players() -> BuildPlayers:
    user = SimulatorsSection.model_validate({"user": {"model": "mini-user"}}).user
    scorer = make_scorer(
        {"accuracy": 1.0, "interactivity": 1.0, "token_amount": -0.5}, Role("mini-judge"), accuracy_verifier="judge"
    )
    return BuildPlayers(
        assistant=Role("mini-assistant"),
        user=LLMUserSimulator(user, Role("mini-user")),
        scorer=scorer,
        count_tokens=lambda text: len(text.split()),
        proactive=ProactivePrompt(),
    )


RULES = GrowthRules(num_candidates=3, num_futures=2, max_total_turns=4, max_user_turns=2, num_proactive=1)


@pytest.mark.parametrize("task", TASKS)
def test_a_miniature_has_forty_items_in_the_columns_of_its_dataset(task: str) -> None:
    problems = problems_of(task)
    assert len(problems) >= FEWEST
    assert len({problem.task.single_turn_prompt for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.task.prompt == ()
        assert len(sentences(problem.task.single_turn_prompt)) >= 2
        assert problem.task.metadata


def test_the_reference_code_passes_its_tests_in_a_process_of_its_own() -> None:
    tasks = [problem.task for problem in problems_of("bigcodebench")]
    whole = "import sys, types, unittest\nsuite = unittest.TestSuite()\n"
    for number, task in enumerate(tasks):
        assert f"def {task.metadata['entry_point']}(" in task.ground_truth
        source = json.dumps(f"{task.ground_truth}\n{task.metadata['test']}")
        whole += f"m{number} = types.ModuleType('m{number}'); exec({source}, m{number}.__dict__)\n"
        whole += f"suite.addTests(unittest.defaultTestLoader.loadTestsFromModule(m{number}))\n"
    whole += "result = unittest.TextTestRunner().run(suite)\nsys.exit(not result.wasSuccessful())\n"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split("Ran ")[1].split()[0]) >= 2 * len(tasks)


@pytest.mark.parametrize("task", TASKS)
async def test_asking_is_worth_more_than_guessing(task: str) -> None:
    """The futures of a question reach the reference, those of a guess do not."""
    rows: list[dict[str, Any]] = []
    for problem in problems_of(task)[:12]:
        rows += await grow_conversation(problem, RULES, players())
    first = [row for row in rows if row["turn_id"] == 0]
    asked = [row["score"] for row in first if row["completion"] == QUESTION]
    guessed = [row["score"] for row in first if row["completion"] != QUESTION]
    assert asked
    assert guessed
    assert min(asked) > sum(guessed) / len(guessed)
    assert any(row["proactive"] for row in first)
    for problem in problems_of(task)[:12]:
        own = [row for row in rows if row["conv_id"] == problem.index]
        last = max(own, key=lambda row: (row["turn_id"], row["score"]))
        assert " ".join(problem.task.ground_truth.split()) in " ".join(last["completion"].split())


def ask(role: str, *turns: tuple[str, str]) -> str:
    (text,) = answer({"model": role, "messages": [{"role": who, "content": text} for who, text in turns]})
    return text


def prompt(request: str, chat: Sequence[Message], *more: str) -> str:
    lines = "\n".join(json.dumps(message.as_dict()) for message in chat)
    return "\n".join([*more, f"<request>{request}</request>", f"<chat>\n{lines}\n</chat>"])


def test_the_user_gives_two_details_for_a_question_and_ends_after_a_result() -> None:
    request = "Help me. It is red. It is old. It is big."
    said = [json.loads(ask("mini-user", ("user", prompt(request, ()))))["response"]]
    assert said == ["Help me."]
    chat = [Message("user", "Help me."), Message("assistant", "How is it?")]
    assert json.loads(ask("mini-user", ("user", prompt(request, chat))))["response"] == "It is red.\nIt is old."
    chat += [Message("user", "It is red. It is old."), Message("assistant", "And?")]
    assert json.loads(ask("mini-user", ("user", prompt(request, chat))))["response"] == "It is big."
    chat[-1] = Message("assistant", "A house.")
    assert TERMINATION_SIGNAL in json.loads(ask("mini-user", ("user", prompt(request, chat))))["response"]


def test_the_judge_answers_what_its_prompt_asks_for() -> None:
    chat = [
        Message("user", "Help."),
        Message("assistant", "How?"),
        Message("user", "So."),
        Message("assistant", "```py\nx = 1\n```"),
    ]
    found = json.loads(ask("mini-judge", ("user", prompt("Help. So.", chat, '{"found": true}'))))
    assert (found["found"], found["text"]) == (True, "x = 1")
    assert json.loads(ask("mini-judge", ("user", prompt("Help. So.", chat[:2], '{"found": true}'))))["found"] is False
    reference = "<reference>x  =  1</reference>"
    for answered, right in ((chat, True), (chat[:2], False)):
        said = ask("mini-judge", ("user", prompt("Help. So.", answered, '{"correct": true}', reference)))
        assert json.loads(said)["correct"] is right
    for answered, score in ((chat, 1.0), ([chat[0], chat[3]], 0.0), ([*chat[:2], *chat[:2]], 0.5)):
        said = ask("mini-judge", ("user", prompt("Help. So.", answered, '{"understanding": 0.0}')))
        assert json.loads(said)["clarification"] == score
    with pytest.raises(ValueError, match="scores interactivity"):
        ask("mini-judge", ("user", prompt("Help. So.", chat)))


def test_items_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.jsonl file"):
        learn_items(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"title": "a"}\n')
    with pytest.raises(UserError, match="no item of conf/mini"):
        learn_items(tmp_path)


def test_a_model_for_a_miniature_writes_any_text(tmp_path: Path) -> None:
    from collab_megatron.data.chat import ChatTemplate, load_tokenizer
    from collab_megatron.demo.tiny_model import write_model

    write_model(tmp_path / "model", 1, MINI / "bigcodebench.jsonl")
    chat = ChatTemplate(load_tokenizer(tmp_path / "model"))
    assert chat.growth_difference() is None
    text = "def f(x):\n    return {x: 'größe – ✓'}\n"
    ids, mask = chat.sft_ids_and_mask([Message("user", "hi"), Message("assistant", text)])
    assert chat.reply_text([i for i, kept in zip(ids, mask, strict=True) if kept]) == text
    with pytest.raises(UserError, match="holds no texts"):
        write_model(tmp_path / "other", 1, tmp_path / "none.jsonl")
