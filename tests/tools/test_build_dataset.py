"""tools/build_dataset.py and tools/prepare_dataset.py end to end, against the demo's endpoint as a process."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from collab_megatron.data.dataset_source import load_rows
from collab_megatron.data.parquet import read_conversations, read_tasks
from collab_megatron.data.prepare import collaborative_prompt
from collab_megatron.errors import RunError, UserError
from collab_megatron.rollout.journal.database import connect
from collab_megatron.types import Message
from tests.conftest import REPOSITORY
from tests.tools.build_helpers import READY_S, TOOL_S, build, built_rows, tool

pytestmark = pytest.mark.slow


def test_build_then_prepare(config: Path, tmp_path: Path) -> None:
    ran = tool("build_dataset", str(config), "num_conversations=30", "processes=2")
    assert ran.returncode == 0, ran.stderr
    assert "30 of 30 conversations (0 from before, 0 failed)" in ran.stdout
    assert "assistant:" in ran.stdout
    rows = built_rows(config)
    assert {row["conv_id"] for row in rows} == set(range(30))
    assert len(list((tmp_path / "built").glob("conversations-*.jsonl"))) == 2
    for row in rows:
        rewards = row["rewards"]
        assert set(rewards) == {"accuracy", "interactivity", "token_amount", "MR"}
        assert 1 <= len(row["sessions"]) <= 2
        assert all(len(scores) == len(row["sessions"]) for scores in rewards.values())
        mean = {name: sum(scores) / len(scores) for name, scores in rewards.items()}
        assert row["score"] == pytest.approx(mean["MR"])
        assert mean["MR"] == pytest.approx(mean["accuracy"] + mean["interactivity"] - 0.1 * mean["token_amount"])
    # A question's futures differ from a guess's: the engine has something to choose from.
    assert max(row["score"] for row in rows) > 1.9
    assert min(row["score"] for row in rows) < 0.5
    later = [row for row in rows if row["turn_id"] > 0]
    assert later
    assert all(len(row["prompt"]) == 2 * row["turn_id"] + 1 for row in rows)
    for row in later:
        kept = [r for r in rows if r["conv_id"] == row["conv_id"] and r["turn_id"] == row["turn_id"] - 1]
        best = max(kept, key=lambda r: r["score"])
        assert row["prompt"][-2]["content"] == best["completion"]
        following = len(best["prompt"]) + 1  # sessions are whole conversations
        assert row["prompt"][-1]["content"] in [session[following]["content"] for session in best["sessions"]]

    out, heldout = tmp_path / "out", str(tmp_path / "tasks" / "heldout.jsonl")
    common = ("prepare_dataset", "--dataset", str(tmp_path / "built"), "--output", str(out), "--dataset-type")
    extra = ("--turns", "first", "--validation", heldout, "--system-prompt", "Be brief.")
    with ThreadPoolExecutor() as pool:
        sft, rl = pool.submit(tool, *common, "sft", "--collaborative-prompt"), pool.submit(tool, *common, "rl", *extra)
    assert sft.result().returncode == 0, sft.result().stderr
    held_out = read_conversations(out / "sft_validation.parquet")  # a share of its own, as nothing else is named
    assert 0 < len(held_out) < 15
    assert {chat.messages[0] for chat in held_out} == {Message("system", collaborative_prompt())}
    assert len(read_conversations(out / "sft_train.parquet")) == 30 - len(held_out)
    assert rl.result().returncode == 0, rl.result().stderr
    assert len(read_tasks(out / "rl_train.parquet")) == 30
    validation = read_tasks(out / "rl_validation.parquet")
    assert len(validation) == 10
    assert {task.prompt[0].content for task in validation} == {"Be brief."}
    assert open_to_others(tmp_path / "built") == open_to_others(out) == []


def open_to_others(folder: Path) -> list[Path]:
    """What anybody but its owner may read, write or enter."""
    return [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]


def test_an_interrupted_build_goes_on(config: Path, tmp_path: Path) -> None:
    build(config, "num_conversations=12")
    shard = tmp_path / "built" / "conversations-000.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    longest, count = Counter(json.loads(line)["conv_id"] for line in lines).most_common(1)[0]
    assert count > 1
    whole = [line for line in lines if json.loads(line)["conv_id"] != longest]
    cut = [line for line in lines if json.loads(line)["conv_id"] == longest]
    # A kill fell after a line's end, then inside a line.
    for torn in ("".join(whole + cut[:-1]), "".join(whole) + cut[0][:50]):
        shard.write_text(torn)
        progress = build(config, "num_conversations=14")
        rows = built_rows(config)
        counts = Counter(row["conv_id"] for row in rows)
        assert set(counts) == set(range(14))
        assert all(counts[row["conv_id"]] == row["conv_rows"] for row in rows)
        assert shard.read_text().startswith("".join(whole))
        assert progress.counts.failed == 0
        shard_after = {json.dumps(row) for row in rows if row["conv_id"] == longest}
        assert shard_after == {json.dumps(json.loads(line)) for line in cut}  # the same seed makes the same again
    finished = build(config, "num_conversations=14")
    assert finished.before == 14
    assert finished.calls == 0
    assert len(load_rows(str(tmp_path / "built"))) == len(built_rows(config))


def spent_calls(config: Path) -> int:
    """Answers that were paid for, over all processes and attempts."""
    journal = config.parent / "built" / "journal.sqlite"
    if not journal.exists():
        return 0
    with closing(connect(journal, read_only=True)) as connection:
        return sum(calls for (calls,) in connection.execute("SELECT calls FROM spend"))


def test_a_killed_build_asks_for_nothing_twice(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed, it goes on with what was paid for, and makes the rows of a build that was left alone. No second one
    writes to its folder, and its workers do not outlive it."""
    overrides = ("num_conversations=30", "journal.keep_all=true")
    whole = build(config, f"output={tmp_path / 'whole'}", *overrides)
    rows = sorted(line for shard in (tmp_path / "whole").glob("*.jsonl") for line in shard.read_text().splitlines())
    command = [sys.executable, str(REPOSITORY / "tools" / "build_dataset.py"), str(config), *overrides]
    killed = subprocess.Popen([*command, "processes=2", "max_concurrency=1"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + TOOL_S
    while spent_calls(config) < 40:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGSTOP)  # the second one finds a first that is not done
    for process in workers:
        process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(command[1], run_name="__main__")
    assert f"is in use: process {killed.pid} on " in capsys.readouterr().err
    killed.kill()
    killed.wait(READY_S)
    for process in workers:
        process.send_signal(signal.SIGCONT)
    assert not psutil.wait_procs(workers, timeout=READY_S)[1]
    paid = spent_calls(config)
    assert 40 <= paid < whole.calls
    again = build(config, *overrides)
    assert again.calls == whole.calls - paid  # also of conversations that the kill found in the middle
    assert spent_calls(config) == whole.calls  # a request that was paid for twice would count twice
    shards = (tmp_path / "built").glob("*.jsonl")
    assert sorted(line for shard in shards for line in shard.read_text().splitlines()) == rows


def test_a_build_that_spent_its_budget_keeps_what_is_finished_and_goes_on(config: Path) -> None:
    capped = tool("build_dataset", str(config), "num_conversations=40", "processes=2", "max_concurrency=2",
                  "budget={soft_calls: 20, hard_calls: 60}")  # fmt: skip
    assert capped.returncode == 3, capped.stderr
    assert "above budget.soft_calls (20)" in capped.stderr
    assert "raise budget.hard_calls and run the same command again to go on" in capped.stderr
    rows = built_rows(config)
    counts = Counter(row["conv_id"] for row in rows)
    assert 0 < len(counts) < 40
    assert all(counts[row["conv_id"]] == row["conv_rows"] for row in rows)  # whole conversations, none begun in vain
    paid = spent_calls(config)
    assert paid >= 60
    still = build(config, "num_conversations=40", "budget.hard_calls=60")
    assert (still.counts.done, still.calls) == (0, 0)
    assert "budget.hard_calls" in still.counts.spent
    rest = build(config, "num_conversations=40")
    assert rest.before == len(counts)
    assert rest.complete
    assert spent_calls(config) == paid + rest.calls
    with closing(connect(config.parent / "built" / "journal.sqlite", read_only=True)) as journal:
        assert journal.execute("SELECT count(*) FROM replies").fetchone() == (0,)  # a complete build needs none


def test_a_cap_in_dollars_wants_a_price_of_every_role(config: Path) -> None:
    with pytest.raises(UserError, match=r"budget\.hard_usd cannot count what simulators\.user costs"):
        build(config, "budget.hard_usd=1")
    ran = tool("build_dataset", str(config), "budget.hard_usd=1", "--dry-run")
    assert ran.returncode == 2
    assert "simulators.user.input_usd_per_mtoken" in ran.stderr


def test_the_same_seed_builds_the_same_rows(config: Path, tmp_path: Path) -> None:
    def rows(name: str, *overrides: str) -> list[str]:
        build(config, f"output={tmp_path / name}", "num_conversations=10", *overrides)
        return sorted(line for shard in (tmp_path / name).glob("*.jsonl") for line in shard.read_text().splitlines())

    assert rows("a") == rows("b", "max_concurrency=3") != rows("c", "seed=2")


def test_the_simulator_opens_where_a_problem_brings_no_prompt(config: Path, tmp_path: Path) -> None:
    problems = tmp_path / "tasks" / "train.jsonl"
    rows = [json.loads(line) for line in problems.read_text().splitlines()[:5]]
    for row in rows:
        del row["prompt"]
    problems.write_text("\n".join(map(json.dumps, rows)))
    build(config, "system_prompt=Be brief.")
    for row in built_rows(config):
        assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
        assert row["prompt"][1]["role"] == "user"


def test_futures_without_users_still_continue_the_chat(config: Path) -> None:
    build(config, "num_conversations=10", "max_user_turns=0", "max_total_turns=2")
    rows = built_rows(config)
    assert any(row["turn_id"] == 1 for row in rows)
    assert all(
        session == [*row["prompt"], {"role": "assistant", "content": row["completion"]}]
        for row in rows
        for session in row["sessions"]
    )


def test_failed_conversations_are_counted_and_left_out(config: Path, tmp_path: Path) -> None:
    problems = tmp_path / "tasks" / "train.jsonl"
    good = problems.read_text().splitlines()[:4]
    bad = json.dumps({**json.loads(good[0]), "single_turn_prompt": "a request that the desk cannot read"})
    problems.write_text("\n".join([*good, bad]))
    progress = build(config)
    assert (progress.counts.done, progress.counts.failed) == (4, 1)
    assert "1 failed" in progress.line()
    assert {row["conv_id"] for row in built_rows(config)} == set(range(4))


def test_a_hopeless_build_gives_up(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collab_megatron.data_engine.worker.HOPELESS_FAILURES", 5)
    with pytest.raises(RunError, match=r"5 conversations failed in a row.*assistant \(hosted_vllm/nobody\).*404"):
        build(config, "simulators.assistant.model=hosted_vllm/nobody")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("problems=nowhere.jsonl", "no problems file"),
        ("simulators.judge.api_base=http://127.0.0.1:9/v1", "simulators.judge.api_base"),
        ("simulators.user.api_key_env=NO_SUCH_KEY", "NO_SUCH_KEY"),
        ("tokenizer=no/such/folder", "the tokenizer of no/such/folder cannot be loaded"),
        ("simulators.user.prompt_file=none.txt", "none.txt"),
    ],
)
def test_mistakes_are_user_errors(config: Path, override: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(config, override)


def test_mistakes_end_with_one_sentence(config: Path, tmp_path: Path) -> None:
    cases = [
        (["num_candidates=3"], 2, "did you mean 'num_candidate_responses'"),
        (["simulators.user.api_base=http://127.0.0.1:9/v1", "processes=2"], 2, "simulators.user.api_base"),
        (["simulators.assistant.model=hosted_vllm/nobody", "num_conversations=3"], 1, "no conversation was finished"),
    ]
    with ThreadPoolExecutor() as pool:
        running = [
            pool.submit(tool, "build_dataset", str(config), f"output={tmp_path / str(number)}", *overrides)
            for number, (overrides, _, _) in enumerate(cases)
        ]
    for ran, (_, code, complaint) in zip((run.result() for run in running), cases, strict=True):
        assert ran.returncode == code, ran.stderr
        assert complaint in ran.stderr
        assert "Traceback" not in ran.stderr


def test_a_dry_run_counts_calls_and_makes_nothing(config: Path, tmp_path: Path) -> None:
    ran = tool("build_dataset", str(config), "--dry-run", f"output={tmp_path / 'none'}", "num_conversations=3")
    assert ran.returncode == 0, ran.stderr
    assert "num_conversations: 3" in ran.stdout
    assert "grows       3 conversations of at most " in ran.stdout
    assert " calls of assistant to " in ran.stdout
    assert "for 1 build" in ran.stdout
    assert not (tmp_path / "none").exists()
    ran = tool("build_dataset", str(config), "--dry-run", "simulators.user.prompt_file=none.txt")
    assert ran.returncode == 2
    assert "none.txt" in ran.stderr


def test_bad_problems_name_the_line(config: Path, tmp_path: Path) -> None:
    problems = tmp_path / "tasks" / "train.jsonl"
    for text, complaint in [
        ('{"single_turn_prompt": "x"}', "problem 1 has no text 'single_turn_completion'"),
        ('{"single_turn_prompt": " ", "single_turn_completion": "y"}', "problem 1: single_turn_prompt is empty"),
        (
            '{"single_turn_prompt": "x", "single_turn_completion": "y", "prompt": [{"role": "system"}]}',
            "prompt must be",
        ),
        ("{", "line 1 is not valid JSON"),
        ("", "holds no problems"),
    ]:
        problems.write_text(text)
        with pytest.raises(UserError, match=complaint):
            build(config)


def test_a_folder_that_was_begun_otherwise_is_not_mixed(config: Path) -> None:
    build(config, "num_conversations=2")
    build(config, "num_conversations=3", "simulators.user.timeout_s=7", "max_concurrency=1")
    with pytest.raises(UserError, match=r"another simulators\.user\.temperature:"):
        build(config, "num_conversations=4", "simulators.user.temperature=0.5")
    with pytest.raises(UserError, match="another num_repeat_rollouts"):
        build(config, "num_conversations=4", "num_repeat_rollouts=1")
    with pytest.raises(UserError, match=r"another .*reward\.judges\.interactivity\.model"):
        build(
            config, "num_conversations=4", "reward.judges.interactivity={model: hosted_vllm/other, api_key_env: null}"
        )


def test_a_changed_prompt_or_metric_module_is_not_mixed(config: Path, tmp_path: Path) -> None:
    prompt, module = tmp_path / "mine.txt", tmp_path / "mine.py"
    prompt.write_text("<request>$request</request><chat>$chat</chat>")
    module.write_text("A = 1")
    overrides = (f"simulators.user.prompt_file={prompt}", "reward.metric_modules=[mine]")
    build(config, "num_conversations=2", *overrides)
    build(config, "num_conversations=3", *overrides)
    module.write_text("A = 2")
    with pytest.raises(UserError, match="another reward:"):
        build(config, "num_conversations=4", *overrides)
    module.write_text("A = 1")
    prompt.write_text("Listen! <request>$request</request><chat>$chat</chat>")
    with pytest.raises(UserError, match=r"another simulators\.user\.prompt_file:"):
        build(config, "num_conversations=4", *overrides)


def test_prepare_names_a_missing_column(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": [], "reply": ""}\n')
    arguments = ["--dataset", str(tmp_path / "rows.jsonl"), "--dataset-type", "rl", "--output", str(tmp_path)]
    ran = tool("prepare_dataset", *arguments)
    assert ran.returncode == 2
    assert "no columns 'completion', 'conv_id', 'single_turn_prompt'; its columns are prompt, reply" in ran.stderr
