"""The demo in a few steps: real Megatron-Core, real SGLang, real LiteLLM against a real endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.parquet import read_conversations
from collab_megatron.demo.pipeline import desk_addresses
from collab_megatron.json_lines import read_rows
from collab_megatron.rollout.record_files import read_trees
from collab_megatron.trainer.engine_probe import NUM_PROMPTS
from collab_megatron.trainer.report.charts import charts
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.wire.checkpoints import newest_complete, read_best, read_info
from tests.conftest import DESK_KEY, Ended, Run, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USERS = ("user", "user-1")  # conf/demo_mixture.yaml has two
DASHBOARD = [
    "reward/mr_mean",
    "reward/mr_std",
    "reward/accuracy_mean",
    "reward/accuracy_std",
    "reward/interactivity_mean",
    "reward/token_amount_mean",
    "advantage/std",
    "rollout/clarify_rate",
    "rollout/reply_tokens_mean",
    "rollout/tokens_per_s",
    "train/kl",
    "train/entropy",
    "train/clip_fraction",
    "train/grad_norm",
    "train/logprob_gap",
    "train/tokens_per_s",
    "train/lr",
    "time_s/rollout",
    "time_s/simulators",
    "time_s/judges",
    "time_s/logprobs",
    "time_s/update",
    "time_s/weight_sync",
    "simulator/user/calls",
    "simulator/judge/calls",
    "simulator/user/cost_usd",
    "simulator/judge/cost_usd",
]


def test_the_summary_holds_every_figure(short_demo: tuple[Path, Ended]) -> None:
    run_dir, ended = short_demo
    summary = json.loads((run_dir / "summary.json").read_text())
    rates = ("clarify_rate_ambiguous", "clarify_rate_complete", "mr")
    for name in ("accuracy", *rates, "accuracy_bare_answers", "accuracy_unseen_user"):
        assert set(summary[name]) == {"base", "sft", "rl"}
    assert {"data", "evaluate_base", "sft", "rl", "export", "proof"} <= set(summary["wall_s"])
    assert summary["api_calls"]["user"] > 0
    assert summary["api_calls"]["assistant"] > 0
    assert "prompts_per_step: 4" in summary["config"]["rl"]
    assert {"user-1", "user-bare", "user-unseen"} <= set(summary["api_calls"])
    assert "accuracy bare answers" in ended.output
    assert "tensorboard --logdir" in ended.output
    assert "rl 3/3" in ended.output
    assert "done        3 steps of rl" in ended.output
    told = re.search(r"held out    after step 3: mr ([-.\d]+)", ended.output)
    assert told is not None
    assert abs(float(told[1]) - summary["mr"]["rl"]) < 0.001  # each is rounded


def test_the_terminal_tells_of_rank_0_what_was_chosen_and_the_logs_of_the_others(
    short_demo: tuple[Path, Ended],
) -> None:
    run_dir, ended = short_demo
    for told in (
        "trainer.actor.backend: backend cpu: gloo",
        "trainer.actor.grid: layout: rank {} of 2",
        "trainer.actor.optimizer: optimizer: ",
    ):
        assert f" trainer-0 {told.format(0)}" in ended.output
        assert f" trainer-1 {told.format(1)}" not in ended.output
        assert f" trainer-1 {told.format(1)}" in (run_dir / "logs" / "rl" / "latest" / "trainer-1.log").read_text()


def test_the_dashboard_shows_every_step(short_demo: tuple[Path, Ended]) -> None:
    run_dir, _ = short_demo
    steps = [row for row in read_metrics(run_dir / "tensorboard" / "rl") if "time_s/step" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        missing = [name for name in DASHBOARD if name not in row]
        assert not missing
        # fp32 on both sides: the engine serves exactly the weights that the trainer trains
        assert row["train/logprob_gap"] < 1e-4
    tags = EventAccumulator(str(run_dir / "tensorboard" / "rl")).Reload().Tags()
    assert {f"trees/{name}/text_summary" for name in ("best", "median", "worst")} <= set(tags["tensors"])
    names = {name for row in read_metrics(run_dir / "tensorboard" / "rl") for name in row}
    lines = {
        chart.title: [name for name in names if any(re.fullmatch(figure, name) for figure in chart.figures)]
        for chart in charts()
    }
    assert [title for title, found in lines.items() if not found] == ["MFU"]  # of known GPUs only


def test_sft_measures_its_held_out_loss_and_keeps_the_best(short_demo: tuple[Path, Ended]) -> None:
    """10 steps at TP=2, measured every 4: the loss of the exported weights is what plain transformers finds."""
    run_dir, ended = short_demo
    rows = read_metrics(run_dir / "tensorboard" / "sft")
    losses = {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}
    assert list(losses) == [0, 4, 8, 10]
    assert losses[10] < losses[0]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 11))  # a short run shows every step
    assert ended.output.count("trained tokens/s") == 10
    best = read_best(run_dir / "checkpoints" / "sft")
    assert best is not None
    assert (best.step, best.loss) == min(((s, loss) for s, loss in losses.items() if s), key=lambda pair: pair[1])
    assert f"the weights after step {best.step} are in {run_dir / 'sft_hf'}" in ended.output
    found = plain_loss(run_dir / "sft_hf", run_dir / "data" / "sft_validation.parquet")
    assert found == pytest.approx(best.loss, rel=1e-5)
    assert f"held-out loss {best.loss:.4f} after step {best.step}, the lowest so far" in ended.output


def plain_loss(model_folder: Path, conversations: Path) -> float:
    """Mean negative log-likelihood of the assistant tokens, one conversation at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    chat = ChatTemplate(load_tokenizer(model_folder))
    total, tokens = 0.0, 0
    for row in read_conversations(conversations):
        ids, mask = chat.sft_ids_and_mask(row.messages)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        of_label = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        trained = torch.tensor(mask[1:])
        total, tokens = total - of_label[trained].sum().item(), tokens + int(trained.sum())
    return total / tokens


def test_every_user_of_the_evaluation_has_figures_and_conversations(short_demo: tuple[Path, Ended]) -> None:
    run_dir, ended = short_demo
    rows = [row for row in read_metrics(run_dir / "tensorboard" / "rl") if "eval/accuracy" in row]
    assert [row["step"] for row in rows] == [0, 3]
    for row in rows:
        assert row["eval/users/bare/conversations"] == row["eval/users/unseen/conversations"] == 24
    folder = run_dir / "evaluations" / "rl"
    for user in ("bare", "unseen"):
        (_, last) = sorted((folder / "users" / user).glob("*.jsonl"))
        lines = [json.loads(line) for line in last.read_text().splitlines()]
        roles = {call["role"] for line in lines for call in line["replies"][0]["futures"][0]["calls"]}
        assert f"user-{user}" in roles
        assert "user" not in roles
    table = json.loads((run_dir / "evaluation_base.table.json").read_text())
    assert [row["user"] for row in table["rows"]] == ["simulators.user", "bare", "unseen"]
    assert "users/bare/accuracy" in ended.output


def test_every_tree_is_written_down(short_demo: tuple[Path, Ended]) -> None:
    run_dir, _ = short_demo
    trees = list(read_trees(run_dir / "conversations" / "rl"))
    assert [tree["step"] for tree in trees] == [step for step in (1, 2, 3) for _ in range(4)]
    for tree in trees:
        assert len(tree["replies"]) == 4
        uniform = len({tuple(reply["token_ids"]) for reply in tree["replies"]}) == 1
        for reply in tree["replies"]:
            assert reply["weight_versions"] == [tree["step"] - 1]  # on-policy: sampled by the weights before this step
            assert len(reply["token_ids"]) == len(reply["logprobs"])
            assert len(reply["futures"]) == (1 if uniform else 2)
            rewards = [future["reward"] for future in reply["futures"]]
            assert reply["mr"] == pytest.approx(sum(rewards) / len(rewards))
            same = None if reply["same_as"] is None else tree["replies"][reply["same_as"]]
            assert all(future["copied"] for future in reply["futures"]) == (same is not None)
            if same is not None:
                assert (same["token_ids"], same["mr"]) == (reply["token_ids"], reply["mr"])
            for future in reply["futures"]:
                assert set(future["scores"]) == {"accuracy", "interactivity", "token_amount"}
                assert future["status"] in ("terminated", "max_turns", "truncated")
    replies = [reply for tree in trees for reply in tree["replies"]]
    # a reply that broke off is judged once, and its other futures are copies without calls
    for reply in replies:
        if reply["cut"] or not reply["text"].strip():
            assert all(future["copied"] for future in reply["futures"][1:])
    assert all(future["calls"] == [] for reply in replies for future in reply["futures"] if future["copied"])
    futures = [future for reply in replies for future in reply["futures"] if not future["copied"]]
    assert any(future["messages"] for future in futures)
    for future in futures:
        said = [message["content"] for message in future["messages"] if message["role"] == "assistant"]
        assert [turn["text"] for turn in future["turns"]] == said
        assert all(len(turn["token_ids"]) == len(turn["logprobs"]) > 0 for turn in future["turns"])
        asked = [call for call in future["calls"] if call["role"] in USERS]
        turns = sum(message["role"] == "user" for message in future["messages"])
        assert len(asked) in (turns, turns - 1)  # the first turns of two futures come from one request
        (judged,) = (call for call in future["calls"] if call["metric"] == "interactivity")
        assert set(judged["marks"]) == {"understanding", "clarification", "suggestion"}
        assert all(call["begin_s"] <= call["end_s"] for call in future["calls"])
        assert all((call["prompt_tokens"] > 0) != call["shared"] for call in future["calls"])
    said = [message for future in futures for message in future["messages"] if message["role"] == "user"]
    assert sum(call["role"] in USERS for future in futures for call in future["calls"]) < len(said)


def test_the_export_was_proved_against_the_engine(short_demo: tuple[Path, Ended]) -> None:
    run_dir, ended = short_demo
    probe = json.loads((run_dir / "engine_probe" / "rl.json").read_text())
    assert len(probe["rows"]) == NUM_PROMPTS
    assert f"transformers and the engine agree on all {NUM_PROMPTS} prompts" in ended.output
    assert probe["weight_version"] == "3"
    assert (run_dir / "hf" / "model.safetensors").exists()


def test_a_checkpoint_is_evaluated_with_the_config_of_its_run(
    short_demo: tuple[Path, Ended], warm_run: Run, desk: Server, tmp_path: Path
) -> None:
    """The same conversations as the run's own last evaluation: same weights, tasks, seeds, and greedy decoding."""
    run_dir, _ = short_demo
    data = run_dir / "data"
    asked = [
        *("-m", "collab_megatron.evaluate", "conf/demo_rl.yaml", f"model.path={run_dir / 'checkpoints' / 'rl'}"),
        *(f"run.dir={tmp_path}", f"data.train={data / 'rl_train.parquet'}"),
        *(f"data.validation={data / 'rl_validation.parquet'}", "evaluation.num_tasks=24"),
        *desk_addresses(desk.url, "user", "judge"),
    ]
    looked = warm_run(*asked, "--dry-run")
    assert looked.code == 0, looked.output[-4000:]
    assert not (tmp_path / "converted").exists()
    ended = warm_run(*asked)
    assert ended.code == 0, ended.output[-4000:]
    (model,) = (tmp_path / "converted").iterdir()
    assert model.name.startswith("rl-step_00000003-")
    exported = run_dir / "hf" / "model.safetensors"
    assert (model / "model.safetensors").read_bytes() == exported.read_bytes()

    folder = tmp_path / "evaluations" / "evaluate-rl"
    figures = json.loads((folder / f"{model.name}.json").read_text())
    (*_, own) = map(json.loads, (run_dir / "evaluations" / "rl.jsonl").read_text().splitlines())
    assert own["step"] == 3
    for name in ("accuracy", "interactivity", "token_amount", "mr", "clarify_rate", "conversations"):
        assert figures[name] == pytest.approx(own[name]), name
    assert figures["simulator/user/answers"] > 0
    ours, theirs = (
        {tree["task_id"]: tree for tree in map(json.loads, path.read_text().splitlines())}
        for path in (folder / f"{model.name}.jsonl", run_dir / "evaluations" / "rl" / "step_00000003.jsonl")
    )
    assert len(ours) == 24
    for task_id, tree in ours.items():
        (reply,), (their_reply,) = tree["replies"], theirs[task_id]["replies"]
        assert reply["text"] == their_reply["text"]
        assert reply["futures"][0]["messages"] == their_reply["futures"][0]["messages"]
        assert reply["futures"][0]["scores"] == their_reply["futures"][0]["scores"]
    assert "accuracy" in ended.output
    assert str(folder / f"{model.name}.jsonl") in ended.output
    assert DESK_KEY not in ended.output


def test_a_wrong_export_is_found_out(short_demo: tuple[Path, Ended], warm_run: Run) -> None:
    run_dir, _ = short_demo
    ended = warm_run(
        "tools/check_export.py", "--hf", str(run_dir / "model"), "--probe", str(run_dir / "engine_probe" / "rl.json")
    )
    assert ended.code == 1
    assert ended.errors[0].startswith("error: the export")


def test_no_key_was_written_anywhere(short_demo: tuple[Path, Ended]) -> None:
    run_dir, ended = short_demo
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 30
    assert [path for path in written if DESK_KEY.encode() in path.read_bytes()] == []
    assert DESK_KEY not in ended.output


def test_a_second_demo_does_not_write_over_the_first(short_demo: tuple[Path, Ended], warm_run: Run) -> None:
    run_dir, _ = short_demo
    ended = warm_run("tools/demo.py", "--short", "--run-dir", str(run_dir))
    assert ended.code == 2
    assert "is not empty" in ended.errors[0]


def test_resume_goes_on_from_the_newest_checkpoint(
    rl_command: Callable[..., list[str]], warm_run: Run, tmp_path: Path
) -> None:
    first = warm_run(*rl_command(tmp_path, "train.steps=2"))
    assert first.code == 0, first.output[-4000:]
    again = warm_run(*rl_command(tmp_path, "train.steps=2"))
    assert again.code == 2
    assert "run.resume=true" in again.errors[0]
    evaluations, metrics = tmp_path / "evaluations" / "rl.jsonl", tmp_path / "tensorboard" / "rl" / "metrics.jsonl"
    tear(evaluations)
    tear(metrics)
    resumed = warm_run(*rl_command(tmp_path, "train.steps=3", "run.resume=auto"))
    assert resumed.code == 0, resumed.output[-4000:]
    assert "rl 3/3" in resumed.output
    assert "rl 2/3" not in resumed.output
    newest = newest_complete(tmp_path / "checkpoints" / "rl")
    assert newest is not None
    assert read_info(newest).step == 3
    rows = [row for row in read_metrics(metrics.parent) if "time_s/step" in row]
    assert [(row["step"], row["run/attempt"]) for row in rows] == [(1, 1), (2, 1), (3, 2)]
    trees = list(read_trees(tmp_path / "conversations" / "rl"))
    assert sorted({tree["step"] for tree in trees}) == [1, 2, 3]
    assert {tuple(reply["weight_versions"]) for tree in trees[-4:] for reply in tree["replies"]} == {(2,)}

    # as after a kill in the last evaluation: what follows the last step is made, and nothing is trained again
    evaluated, lines = read_rows(evaluations).rows, metrics.read_bytes()
    assert [row["step"] for row in evaluated] == [3]  # that of step 2 was torn, and is not due in a run of 3 steps
    tear(evaluations)
    tear(metrics)
    (tmp_path / "engine_probe" / "rl.json").unlink()
    finished = warm_run(*rl_command(tmp_path, "train.steps=3", "run.resume=auto"))
    assert finished.code == 0, finished.output[-4000:]
    assert "still to do: the held-out evaluation after step 3, the engine probe" in finished.output
    assert "rl 3/3" not in finished.output
    made = read_rows(evaluations)
    assert made.torn_bytes == 0
    assert [(row["step"], row["mr"], row["accuracy"]) for row in made.rows] == [
        (row["step"], row["mr"], row["accuracy"])
        for row in evaluated  # the same conversations
    ]
    assert [row["step"] for row in read_metrics(metrics.parent)] == [
        json.loads(line)["step"] for line in lines.splitlines()
    ]
    assert json.loads((tmp_path / "engine_probe" / "rl.json").read_text())["weight_version"] == "3"
    assert f"held out    after step 3: mr {made.rows[-1]['mr']:.3g}" in finished.output
    done = warm_run(*rl_command(tmp_path, "train.steps=3", "run.resume=auto"))
    assert done.code == 0, done.output[-4000:]
    assert "all 3 steps are done; nothing is left to do" in done.output
    assert "done        3 steps of rl" in done.output
    assert "trainer-0" not in done.output  # nothing was started
    logs = tmp_path / "logs" / "rl"  # of the starts that started something
    assert sorted(path.name for path in logs.iterdir()) == ["attempt-1", "attempt-2", "attempt-3", "latest"]
    assert (logs / "latest").resolve() == logs / "attempt-3"
    for number in (1, 2, 3):
        own = {"resolved.yaml", "api_usage.json", "driver.log", "engines", "trainer-1.log"}
        assert own <= {path.name for path in (logs / f"attempt-{number}").iterdir()}


def tear(record: Path) -> None:
    """What a kill leaves that falls into the writing of the last line."""
    *whole, last = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(whole) + last[: len(last) // 2])
