"""Every mistake of a user ends before a process is started, with one sentence that says how to fix it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from collab_megatron.config import EvaluateConfig, RLConfig, SFTConfig, load_config
from collab_megatron.data.parquet import Conversation, write_conversations, write_tasks
from collab_megatron.errors import UserError
from collab_megatron.launch.config_warnings import NEAR, memory_warnings
from collab_megatron.launch.epochs import epochs_to_steps
from collab_megatron.launch.node import Node, parse_node
from collab_megatron.launch.plan import stages_of
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.preflight import check_evaluate, check_rl, check_supervised
from collab_megatron.model.folder import read_hf_config
from collab_megatron.model.spec import model_spec
from collab_megatron.types import Message
from collab_megatron.wire.checkpoints import step_folder, write_marker
from tests.conftest import DESK_KEY, ONE_USER, REPOSITORY, Server
from tests.rollout.fakes import TASK

Load = Callable[..., RLConfig]


@pytest.fixture
def load(tmp_path: Path, tiny_model: Path, desk: Server, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A sound demo config, with overrides."""
    monkeypatch.setenv("DESK_API_KEY", DESK_KEY)
    tasks = tmp_path / "tasks.parquet"
    write_tasks(tasks, [TASK])

    def loaded(*overrides: str, file: str = "demo_rl.yaml") -> RLConfig:
        sound = [
            f"run.dir={tmp_path / 'run'}",
            f"model.path={tiny_model}",
            f"data.train={tasks}",
            f"data.validation={tasks}",
            f"simulators.user.api_base={desk.url}",
            f"simulators.judge.api_base={desk.url}",
            *ONE_USER,
        ]
        return load_config(RLConfig, REPOSITORY / "conf" / file, [*sound, *overrides])

    return loaded


def refusal(config: RLConfig, node: Node | None = None) -> str:
    """The sentence of the start, which is that of the dry run."""
    sentences = []
    for dry_run in (False, True):
        with pytest.raises(UserError) as caught:
            check_rl(config, dry_run=dry_run, node=node)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
    assert "\n" not in sentences[0]
    return sentences[0]


def test_a_sound_config_passes(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    start = check_rl(load())
    assert start.first_step == 0
    assert start.max_context_tokens > 64
    assert "warning: 1 held-out tasks are trained on too" in capsys.readouterr().out


def test_checkpoints_of_this_run_and_of_another(load: Load, tmp_path: Path) -> None:
    """What each value of run.resume makes of them; true and auto start where there are none."""
    assert [check_rl(load(f"run.resume={value}")).first_step for value in ("true", "auto")] == [0, 0]
    with pytest.raises(UserError, match=r"'run\.resume': input should be True, False or 'auto'"):
        load("run.resume=maybe")
    folder = step_folder(tmp_path / "run" / "checkpoints" / "rl", 7)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "metadata.json").write_text("{}")
    write_marker(folder, step=7, layout={}, extra={"config": load().model_dump(mode="json")})
    assert "set run.resume=true to resume from step_00000007" in refusal(load())
    assert [check_rl(load(f"run.resume={value}")).first_step for value in ("true", "auto")] == [7, 7]
    changed = ("optimizer.lr=0.5", "algorithm.kl_coef=0.5")
    sentence = refusal(load("run.resume=auto", *changed))
    assert "another config (algorithm.kl_coef: 0.005 -> 0.5, and 1 more)" in sentence
    assert sentence.endswith("choose another run.dir or run.name, or set run.resume=true to use this one")
    assert check_rl(load("run.resume=true", *changed)).first_step == 7
    assert check_rl(load("run.resume=auto", "train.steps=99", "engine.count=2", "parallel.tensor=1")).first_step == 7
    end = ("run.resume=true", "optimizer.warmup_steps=1")
    assert check_rl(load(*end, "train.steps=7")).missing == ("the held-out evaluation after step 7", "the engine probe")
    assert "has already done 7 of 6 steps: raise train.steps" in refusal(load(*end, "train.steps=6"))
    fresh = (f"run.init_from={folder.parent}", "run.name=fresh")
    assert check_rl(load(*fresh)).first_step == 0
    assert f"{tmp_path} is not a complete checkpoint" in refusal(load(f"run.init_from={tmp_path}", "run.name=fresh"))
    started_from = load(f"run.init_from={tmp_path / 'gone'}", "run.resume=true")
    assert check_rl(started_from).first_step == 7


def test_epochs_become_steps_of_the_rows_that_can_be_used(
    load: Load, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [replace(TASK, task_id=f"t{number}") for number in range(9)]
    tasks[4] = replace(tasks[4], prompt=(Message("user", "word " * 400),))
    write_tasks(tmp_path / "nine.parquet", tasks)
    short = ("rollout.prompts_per_step=3", "rollout.max_prompt_tokens=100", "optimizer.warmup_steps=1")
    config = epochs_to_steps(
        load(f"data.train={tmp_path / 'nine.parquet'}", "train={epochs: 2.5, steps: null}", *short)
    )
    assert (config.train.steps, config.train.epochs) == (7, None)  # 2.5 x 8 / 3
    assert "train.epochs=2.5: 8 usable prompts in steps of 3 make 7 steps" in capsys.readouterr().out
    assert epochs_to_steps(config) is config
    with pytest.raises(UserError, match=r"train.epochs=2 and train.steps=40 are both set"):
        load("train.epochs=2")
    with pytest.raises(
        UserError, match=r"with the 3 steps of train.epochs: optimizer.warmup_steps=3 leaves no optimizer step"
    ):
        epochs_to_steps(load(f"data.train={tmp_path / 'nine.parquet'}", "train={epochs: 1, steps: null}", *short[:2]))
    chat = (Message("user", "a"), Message("assistant", "b"))
    rows = [Conversation(f"c{number}", chat) for number in range(5)]
    rows[0] = Conversation("c0", (Message("user", "a"), Message("assistant", "b " * 400)))
    write_conversations(tmp_path / "sft.parquet", rows)
    sft = SFTConfig.model_validate(
        {
            "model": {"path": str(tiny_model)},
            "data": {"train": str(tmp_path / "sft.parquet")},
            "train": {"epochs": 3},
            "batch_size": 2,
            "max_tokens": 100,
        }
    )
    assert epochs_to_steps(sft).train.steps == 6  # 3 x 4 / 2


def test_a_layout_that_does_not_divide(load: Load) -> None:
    assert "tensor" in refusal(load("parallel.tensor=3"))


def test_a_model_folder_without_tokenizer_template_or_weights(load: Load, tiny_model: Path, tmp_path: Path) -> None:
    assert "no-such-model" in refusal(load("model.path=/no-such-model"))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "chat_template.jinja").unlink()
    assert "chat template" in refusal(load(f"model.path={broken}"))
    (broken / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(load(f"model.path={broken}"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    assert "supported are LlamaForCausalLM" in refusal(load(f"model.path={broken}"))


def test_data_that_is_missing_empty_or_lacks_a_column(load: Load, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert "nowhere.parquet" in refusal(load("data.train=nowhere.parquet"))
    table = pq.read_table(tmp_path / "tasks.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    assert "empty" in refusal(load(f"data.train={tmp_path / 'empty.parquet'}"))
    pq.write_table(table.drop_columns(["ground_truth"]), tmp_path / "lacking.parquet")
    sentence = refusal(load(f"data.train={tmp_path / 'lacking.parquet'}"))
    assert "ground_truth" in sentence
    assert "lacking.parquet" in sentence
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    assert "other.parquet" in refusal(load(f"data.validation={tmp_path / 'other.parquet'}"))


def test_prompts_that_are_too_long_are_told_and_most_of_them_refused(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = replace(TASK, task_id="long", prompt=(Message("user", "hello " * 60),))
    other = replace(TASK, task_id="other")
    write_tasks(tmp_path / "some.parquet", [TASK, other, long])
    write_tasks(tmp_path / "most.parquet", [TASK, long, replace(long, task_id="longer")])
    limit = "rollout.max_prompt_tokens=40"
    check_rl(load(f"data.train={tmp_path / 'some.parquet'}", limit))
    assert (
        "left out: 1 of 3 prompts (33.3%) have more than 40 tokens; the longest, task long" in capsys.readouterr().out
    )
    sentence = refusal(load(f"data.train={tmp_path / 'most.parquet'}", limit))
    assert "2 of 3 prompts (66.7%) have more than 40 tokens" in sentence
    assert "raise rollout.max_prompt_tokens" in sentence


def test_simulators_without_key_or_answer(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = f"http://127.0.0.1:{free_port()}/v1"
    sentence = refusal(load(f"simulators.judge.api_base={silent}"))
    assert "simulators.judge" in sentence
    assert silent in sentence
    monkeypatch.delenv("DESK_API_KEY")
    sentence = refusal(load())
    assert "DESK_API_KEY" in sentence


def test_a_metric_that_nobody_registered(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = refusal(load("reward.metric_weights={bleu: 1}"))
    assert "'bleu'" in sentence
    # other tests may have registered theirs
    assert re.search(r"known are accuracy, bleu_score, (\w+, )*interactivity, ", sentence)
    assert "no_such_module" in refusal(load("reward.metric_modules=[no_such_module]"))
    check_rl(load("reward.metric_weights.bleu_score=1", "reward.metric_weights.interactivity=null"))
    (tmp_path / "my_metrics.py").write_text(
        "from collab_megatron.rollout.rewards import register_metric\n"
        "from collab_megatron.rollout.rewards.token_amount import TokenAmount\n"
        "class Brevity(TokenAmount):\n    name = 'shortness'\n"
        "register_metric('shortness')(lambda context: Brevity())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    check_rl(load("reward.metric_modules=[my_metrics]", "reward.metric_weights={shortness: 1}"))


def test_a_port_in_use(load: Load) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} " in refusal(load(f"engine.port={port}"))
        before = refusal(load(f"engine.port={port - 1}", "engine.count=2"))
        assert f"port {port} " in before or f"port {port - 1} " in before  # another process may hold that one
        check_rl(load("engine.urls=[http://127.0.0.1:1]", f"engine.port={port}"))  # nothing will be started


def test_gpus_that_are_not_there(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "needs 3 GPUs" in refusal(load("parallel.device=cuda"))
    assert "needs 6 GPUs on the node, 1 are" in refusal(load("parallel.device=cuda", "engine={count: 2, tensor: 2}"))
    assert "needs 2 GPUs" in refusal(load("parallel.device=cuda", "engine={count: 2, placement: colocated}"))
    assert "needs 2 GPUs" in refusal(load("parallel.device=cuda", "engine.urls=[http://127.0.0.1:1]"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "0 are visible" in refusal(load("parallel.device=cuda"))


def test_colocated_engines_stand_on_every_gpu_of_the_trainer(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr("collab_megatron.launch.node.gpu_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr("collab_megatron.launch.machine_checks.has_gpu_packages", lambda: True)
    colocated = ("parallel.device=cuda", "engine.placement=colocated")
    check_rl(load(*colocated, "engine.count=2"))
    check_rl(load(*colocated, "engine.tensor=2"))
    assert refusal(load(*colocated)).endswith("but 1 x engine.tensor=1 ranks are configured: set engine.count to 2")
    assert refusal(load(*colocated, "engine.tensor=3")).endswith("choose an engine.tensor that divides 2")
    one = "engine.urls=[http://127.0.0.1:1]"
    assert refusal(load(*colocated, one)).endswith("name as many engine.urls as 2")
    sentence = refusal(load(*colocated, "engine.count=2", "sync.transport=broadcast"))
    assert "set sync.transport=ipc, or disk, or engine.placement=disaggregated" in sentence
    check_rl(load(*colocated, "engine.count=2", "sync.transport=disk"))
    # without GPUs any number of servers can run next to the trainer
    check_rl(load("parallel.device=cpu", "engine.placement=colocated", "sync.transport=broadcast"))


def test_the_demo_for_one_gpu(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run for a node of one GPU, whatever this machine has."""
    config = load(file="demo_gpu.yaml")
    assert check_rl(config, dry_run=True, node=parse_node("1x80")).first_step == 0
    plan = capsys.readouterr().out
    assert "1 rank on cuda" in plan
    assert "1 SGLang server at tensor parallel 1, colocated" in plan
    assert (config.model.dtype, config.train.steps, config.sync.verify_every) == ("bfloat16", 10, 1)
    assert config.sync.transport_for(config.engine.placement) == "ipc"


def test_an_interpreter_that_is_none(load: Load, tmp_path: Path) -> None:
    check_rl(load(f"engine.python={sys.executable}"))
    assert "no/python is not an executable file" in refusal(load("engine.python=no/python"))
    (tmp_path / "python").write_text("")
    assert "is not an executable file" in refusal(load(f"engine.python={tmp_path / 'python'}"))


def test_a_disk_that_cannot_hold_the_checkpoints(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "1 MB free" in refusal(load())


def test_sft_refuses_to_write_over_an_export(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"precious")
    chat = (Message("user", "a"), Message("assistant", "b"))
    write_conversations(tmp_path / "sft.parquet", [Conversation("c1", chat)])
    config = load_config(
        SFTConfig,
        REPOSITORY / "conf" / "demo_sft.yaml",
        [
            f"run.dir={tmp_path}",
            f"model.path={tiny_model}",
            f"data.train={tmp_path / 'sft.parquet'}",
            f"export_hf={tmp_path / 'export'}",
        ],
    )
    with pytest.raises(UserError, match="not empty"):
        check_supervised(config)
    assert "trainer     2 ranks on cpu" in capsys.readouterr().out  # the plan comes before what the machine refuses


def test_the_start_and_the_dry_run_print_the_same_plan(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    config = load("simulators.user.output_usd_per_mtoken=0.6", "train.eval_interval=10")
    check_rl(config)
    started = capsys.readouterr().out
    check_rl(config, dry_run=True)
    assert capsys.readouterr().out == started
    assert "16 prompts x 8 replies = 128 replies, 256 futures, at most 640 policy turns" in started
    assert "at most 512 calls of user to hosted_vllm/desk-user" in started
    assert "at most 256 calls of judge" in started
    assert "evaluation  at most 2 calls of user" in started  # one task, three turns
    assert "for 40 steps and 5 evaluations" in started
    assert "1,279,232 parameters" in started


def test_a_node_that_is_not_there(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPUs are counted, not this machine's; what only the node can tell is left alone."""
    silent = f"simulators.judge.api_base=http://127.0.0.1:{free_port()}/v1"
    wanted = ("parallel={tensor: 2, data: 2, device: auto}", "engine={count: 2, tensor: 2, python: no/python}", silent)
    check_rl(load(*wanted), dry_run=True, node=parse_node("8x80"))
    assert "needs 8 GPUs on the node, --gpus names 4" in refusal(load(*wanted), parse_node("4x80"))


def test_a_user_that_cannot_end_a_chat_is_told(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = tmp_path / "user.txt"
    prompt.write_text("You want $request. $chat")
    check_rl(load(f"simulators.user.prompt_file={prompt}"))
    assert f"simulators.user.prompt_file={prompt} does not contain $termination_signal" in caplog.text
    caplog.clear()
    prompt.write_text("You want $request. $chat End with ${termination_signal}.")
    check_rl(load(f"simulators.user.prompt_file={prompt}"))
    assert not caplog.text
    prompt.write_text("You want $request.")
    assert "$chat is missing" in refusal(load(f"simulators.user.prompt_file={prompt}"))


def test_memory_near_the_limit_is_told(load: Load, tiny_model: Path) -> None:
    config = load("parallel.device=cuda")
    spec = model_spec(read_hf_config(tiny_model))
    needed = max(stage.device for stage in stages_of(config, spec, "cuda"))
    roomy = Node(gpus=8, gpu_bytes=round(needed / NEAR) + 1, host_bytes=2**60)
    assert not list(memory_warnings(config, spec, roomy))
    (tight,) = memory_warnings(config, spec, replace(roomy, gpu_bytes=needed))
    assert "lower train.micro_batch_tokens" in tight
    (host,) = memory_warnings(load("parallel.device=cpu"), spec, Node(gpus=0, gpu_bytes=None, host_bytes=2**20))
    assert "host memory" in host


def test_weights_that_do_not_fit_the_config(load: Load, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))
    assert "has shape" in refusal(load(f"model.path={broken}"))
    (broken / "model.safetensors").write_bytes(b"\x10")
    assert "cannot be read" in refusal(load(f"model.path={broken}"))
    (broken / "model.safetensors").unlink()
    assert "has no *.safetensors" in refusal(load(f"model.path={broken}"))


def test_an_evaluation_prints_its_calls_before_it_starts(
    load: Load, tmp_path: Path, tiny_model: Path, desk: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    load()  # the key and the data
    overrides = [
        *(f"run.dir={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.validation={tmp_path / 'tasks.parquet'}"),
        *(f"simulators.user.api_base={desk.url}", f"simulators.judge.api_base={desk.url}", *ONE_USER),
    ]
    config = load_config(EvaluateConfig, REPOSITORY / "conf" / "demo_evaluate.yaml", overrides)
    check_evaluate(config, dry_run=True)
    told = capsys.readouterr().out
    assert "plays       1 of 1 held-out tasks, at most 3 policy turns of 24 tokens each, on cpu" in told
    assert "calls       at most 2 calls of user to hosted_vllm/desk-user" in told
    assert "for 1 evaluation" in told


def test_an_evaluation_is_told_and_refused_what_its_start_would_be(
    load: Load, tmp_path: Path, tiny_model: Path, desk: Server, caplog: pytest.LogCaptureFixture
) -> None:
    load()  # the key and the data
    prompt = tmp_path / "user.txt"
    prompt.write_text("You want $request. $chat")
    overrides = [
        *(f"run.dir={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.validation={tmp_path / 'tasks.parquet'}"),
        *(f"simulators.user.api_base={desk.url}", f"simulators.judge.api_base={desk.url}", *ONE_USER),
        f"simulators.user.prompt_file={prompt}",
    ]
    config = load_config(EvaluateConfig, REPOSITORY / "conf" / "demo_evaluate.yaml", overrides)
    check_evaluate(config, dry_run=True)
    assert f"simulators.user.prompt_file={prompt} does not contain $termination_signal" in caplog.text
    narrow = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_prompt_tokens": 1})})
    with pytest.raises(UserError, match=r"1 of 1 prompts .* raise rollout.max_prompt_tokens"):
        check_evaluate(narrow, dry_run=True)
