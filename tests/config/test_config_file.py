"""YAML to config: extends, overrides, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from collab_megatron.config import (
    EvaluateConfig,
    RLConfig,
    SFTConfig,
    dump_config,
    kept_config,
    load_config,
    show_config,
)
from collab_megatron.config.sections.algorithms import PRESETS
from collab_megatron.errors import UserError

RL = """
model: {path: m}
data: {train: t.parquet}
simulators: {user: {model: gpt-4o-mini}, judge: {model: gpt-4o-mini}}
"""


@pytest.fixture
def rl_file(tmp_path: Path) -> Path:
    path = tmp_path / "rl.yaml"
    path.write_text(RL)
    return path


def test_extends_and_overrides_in_that_order(tmp_path: Path, rl_file: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: rl.yaml\ntrain: {steps: 5}\nsimulators: {user: {temperature: 0.5}}\n")
    config = load_config(RLConfig, child, ["train.steps=7", "run.resume=true"])
    assert (config.train.steps, config.run.resume) == (7, True)
    assert config.simulators.user.model == "gpt-4o-mini"
    assert config.simulators.user.temperature == 0.5


def test_metric_weights_are_replaced_whole(rl_file: Path) -> None:
    config = load_config(RLConfig, rl_file, ["reward.metric_weights={accuracy: 1.0}"])
    assert config.reward.metric_weights == {"accuracy": 1.0}


def test_an_algorithm_by_name_changes_its_own_pieces_only(tmp_path: Path, rl_file: Path) -> None:
    """In a file, in a file that extends it, and on the command line; keys that are set win wherever they stand."""
    plain = load_config(RLConfig, rl_file).algorithm
    assert (plain.preset, plain.policy_loss, plain.aggregation) == ("grpo", "ppo", "token_mean")
    named = tmp_path / "named.yaml"
    named.write_text(f"extends: {rl_file}\nalgorithm: gspo\n")
    algorithm = load_config(RLConfig, named, ["algorithm.clip_high=0.01"]).algorithm
    assert (algorithm.policy_loss, algorithm.clip_low, algorithm.clip_high) == ("gspo", 3e-4, 0.01)
    more = tmp_path / "more.yaml"
    more.write_text("extends: named.yaml\nalgorithm: {kl_coef: 0.25}\n")
    algorithm = load_config(RLConfig, more).algorithm
    assert (algorithm.policy_loss, algorithm.kl_coef) == ("gspo", 0.25)
    for overrides in (["algorithm=dr_grpo"], ["algorithm.preset=dr_grpo"]):
        algorithm = load_config(RLConfig, more, overrides).algorithm
        assert (algorithm.scale, algorithm.policy_loss, algorithm.kl_coef) == ("none", "ppo", 0.25)
    (tmp_path / "dumped.yaml").write_text(dump_config(load_config(RLConfig, more)))
    assert load_config(RLConfig, tmp_path / "dumped.yaml") == load_config(RLConfig, more)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_is_sound(rl_file: Path, preset: str) -> None:
    assert load_config(RLConfig, rl_file, [f"algorithm={preset}"]).algorithm.preset == preset


def test_weights_are_added_and_removed_on_the_command_line(tmp_path: Path, rl_file: Path) -> None:
    def weights(path: Path, *overrides: str) -> dict[str, float]:
        config = load_config(RLConfig, path, [f"reward.metric_weights{override}" for override in overrides])
        return config.reward.metric_weights

    default = {"accuracy": 1.0, "interactivity": 1.0, "token_amount": -0.1}
    assert weights(rl_file) == default
    assert weights(rl_file, ".bleu_score=1") == {**default, "bleu_score": 1.0}
    assert weights(rl_file, ".accuracy=null", ".token_amount=-0.5") == {"interactivity": 1.0, "token_amount": -0.5}
    assert weights(rl_file, "={bleu_score: 1}", ".turn_count=-0.1") == {"bleu_score": 1.0, "turn_count": -0.1}
    child = tmp_path / "child.yaml"
    child.write_text("extends: rl.yaml\nreward: {metric_weights: {pass_rate: 1.0}}\n")
    assert weights(child) == {"pass_rate": 1.0}  # a mapping in a file replaces the default
    assert weights(child, ".token_amount=-0.1") == {"pass_rate": 1.0, "token_amount": -0.1}
    child.write_text("extends: rl.yaml\nreward:\n")
    assert weights(child, ".bleu_score=1") == {**default, "bleu_score": 1.0}
    for overrides, words in (
        ((".acuracy=null",), "acuracy has no weight; metrics with one: accuracy, interactivity, token_amount"),
        (("={accuracy: 1}", ".accuracy=null"), "at least one metric"),
        ((".accuracy",), "is not of the form section.key=value"),
        ((".accuracy=much",), "should be a valid number"),
    ):
        with pytest.raises(UserError, match=words):
            weights(rl_file, *overrides)


def test_what_is_dumped_loads_again(tmp_path: Path, rl_file: Path) -> None:
    config = load_config(RLConfig, rl_file)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(RLConfig, tmp_path / "dumped.yaml") == config


def test_an_rl_config_can_be_evaluated_as_it_is(rl_file: Path) -> None:
    rl = ["train.steps=7", "driver.shards=2", "optimizer.lr=1.0e-5", "sync.bucket_mb=8", "record.every=2"]
    assert set(RLConfig.model_fields) <= set(EvaluateConfig.model_fields)
    config = load_config(EvaluateConfig, rl_file, [*rl, "data.validation=v.parquet", "budget.hard_usd=3"])
    assert config.budget.hard_usd == 3
    with pytest.raises(UserError, match=r"unknown key 'train.stepz'; did you mean 'steps'"):
        load_config(EvaluateConfig, rl_file, [*rl, "data.validation=v.parquet", "train.stepz=3"])
    with pytest.raises(UserError, match="unknown key 'trian'"):
        load_config(EvaluateConfig, rl_file, ["data.validation=v.parquet", "trian.steps=3"])
    with pytest.raises(UserError, match=r"name a \.json file for the figures"):
        load_config(EvaluateConfig, rl_file, ["data.validation=v.parquet", "output=here.jsonl"])


def test_a_config_cannot_change_after_loading(rl_file: Path) -> None:
    with pytest.raises(ValidationError):
        load_config(RLConfig, rl_file).train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'steps'?"),
        ("simulators.judge.modle=x", "did you mean 'model'?"),
        ("qqq=1", "known keys here: algorithm, budget, data"),
        ("algorithm=ppo", "'ppo' is not one of grpo, dr_grpo, rloo"),
        ("algorithm={baseline: batch}", "set algorithm.scale=batch_std"),
        ("algorithm.baseline=leave_one_out", "is GRPO times n / (n - 1): set algorithm.scale=none"),
        ("algorithm={preset: reinforce_pp, zero_advantage: drop}", "set algorithm.zero_advantage=keep"),
        (
            "algorithm={preset: gspo, clip_dual: 3}",
            "which policy_loss=gspo does not have: set algorithm.clip_dual=null",
        ),
        ("algorithm={preset: reinforce_pp, policy_loss: gspo}", "gives every token its own: set algorithm.kl_in=loss"),
        ("algorithm={importance: none, importance_beyond: mask}", "computes no weight to mask or to bound"),
        ("algorithm={importance_floor: 0.5}", "is the lower limit of importance_beyond=mask"),
        ("algorithm={importance_beyond: mask, importance_cap: 0.9}", "choose limits on both sides of 1"),
        ("rollout.top_p=0.9", "truncate the distribution, so the trainer cannot compute its log-probs: leave top_p=1"),
        ("rollout.top_k=50", "top_k=50 truncate the distribution"),
        ("rollout.temperature=0", "greater than or equal to 0.01"),
        ("train.steps=0", "'train.steps': input should be greater than 0 (got 0)"),
        ("train.steps", "is not of the form section.key=value"),
        ("train.steps.x=1", "should be a valid integer"),
        ("train.steps=[", "not valid YAML"),
        ("simulators.judge=null", "set simulators.judge"),
        ("optimizer={schedule: linear, warmup_steps: 100}", "leaves no optimizer step of 100 for the decay"),
        ("rollout.min_replies=9", "so every group would be dropped"),
        ("train.eval_interval=5", "data.validation is not"),
        ("data.train=[]", "must not be empty lists: name a file"),
        ("data.train=[a, a]", "names the file a twice"),
        ("engine.url=x", "did you mean 'urls'?"),
        ("train.stride=3", "known keys here: "),  # a word that is only a little like `steps`
        ("engine={urls: [http://a:1], count: 2}", "set only one of them"),
        ("engine={port: 65535, count: 2}", "leaves too few ports for engine.count=2 servers"),
        ("engine.urls=[localhost:1]", "'localhost:1' is not of the form http://HOST:PORT"),
        ("engine.urls=[http://a:x]", "is not of the form"),
        ("engine.urls=[http://a:1, http://a:1/]", "names a server twice"),
        (
            "simulators.user.api_base=http://me:hidden@a:1/v1",
            "simulators.user.api_base: http://***@a:1/v1 contains a user name",
        ),
        (
            "simulators.user.deployments=[{model: m, api_base: http://hidden@a:1}]",
            "http://***@a:1 contains a user name",
        ),
        ("simulators.user.api_base=me:hidden@a:1/v1", "simulators.user.api_base: ***@a:1/v1 contains a user name"),
        ("engine.urls=[me:hidden@a:1]", "'***@a:1' is not of the form"),
        ("engine={urls: [http://me:hidden@a:1], count: 2}", "set only one of them"),
        ("run.umask=77", "input should be '077', '027', '022', '007', '002' or '000' (got 77)"),
        ("run.umask='777'", "(got '777')"),
        ("run.umask=true", "run.umask: true is not one of '000', '002'"),
        ("engine={urls: [http://a:1], placement: colocated}", "http://a:1 is not a loopback address"),
    ],
)
def test_mistakes_are_one_sentence(rl_file: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RLConfig, rl_file, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("written", ["077", "0o077", "'077'", "'77'", "63"])
def test_a_umask_is_written_as_the_shell_or_python_do(tmp_path: Path, rl_file: Path, written: str) -> None:
    config = load_config(RLConfig, rl_file, [f"run.umask={written}"])
    assert config.run.umask == load_config(RLConfig, rl_file).run.umask == "077"
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(RLConfig, tmp_path / "dumped.yaml") == config
    assert load_config(RLConfig, rl_file, ["run.umask=0"]).run.umask == "000"


def test_what_is_shown_or_kept_of_a_config_holds_no_password(rl_file: Path) -> None:
    config = load_config(RLConfig, rl_file, ["engine.urls=[http://me:hidden@127.0.0.1:1]"])
    assert "http://me:hidden@127.0.0.1:1" in dump_config(config)
    assert "http://***@127.0.0.1:1" in show_config(config)
    for text in (show_config(config), str(kept_config(config))):
        assert "hidden" not in text


def test_memory_is_handed_over_on_one_machine_only(rl_file: Path) -> None:
    near = "engine.urls=[http://127.0.0.1:1, http://localhost:2]"
    for transport, url in (
        ("ipc", near),
        ("disk", "engine.urls=[http://far:1]"),
        ("broadcast", "engine.urls=[http://far:1]"),
    ):
        load_config(RLConfig, rl_file, [f"sync.transport={transport}", url])
    with pytest.raises(UserError, match=r"http://far:1 is not a loopback address: set sync\.transport="):
        load_config(RLConfig, rl_file, ["sync.transport=ipc", "engine.urls=[http://localhost:2, http://far:1]"])


def test_auto_transport_follows_the_placement(rl_file: Path) -> None:
    sync = load_config(RLConfig, rl_file).sync
    assert (sync.transport_for("disaggregated"), sync.transport_for("colocated")) == ("broadcast", "ipc")
    assert load_config(RLConfig, rl_file, ["sync.transport=disk"]).sync.transport_for("colocated") == "disk"


def test_data_is_one_file_or_several(rl_file: Path) -> None:
    several = load_config(RLConfig, rl_file, ["data.train=[a, b]", "data.validation=c"]).data
    assert several.train_files == (Path("a"), Path("b"))
    assert several.validation_files == (Path("c"),)
    one = load_config(RLConfig, rl_file, ["data.train=a", "data.validation=null"]).data
    assert (one.train_files, one.validation_files) == ((Path("a"),), ())


def test_an_interval_without_held_out_data_is_refused_for_sft_too(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("model: {path: m}\ndata: {train: t}\ntrain: {eval_interval: 5}\n")
    with pytest.raises(UserError, match=r"data\.validation is not: name a parquet file of held-out rows"):
        load_config(SFTConfig, tmp_path / "s.yaml")
    assert load_config(SFTConfig, tmp_path / "s.yaml", ["data.validation=v"]).export_weights == "best"


def test_a_section_without_keys_takes_overrides(tmp_path: Path, rl_file: Path) -> None:
    """`train:` alone is null to YAML; so is a judge that another file takes away."""
    (tmp_path / "empty.yaml").write_text("extends: rl.yaml\ntrain:\nsimulators: {judge: null}\n")
    given = ["train.steps=7", "simulators.judge.model=gpt-4o"]
    config = load_config(RLConfig, tmp_path / "empty.yaml", given)
    assert config.train.steps == 7
    assert config.simulators.judge is not None
    assert config.simulators.judge.model == "gpt-4o"
    with pytest.raises(UserError, match="'train' is empty: remove the line, or write its keys below it"):
        load_config(RLConfig, tmp_path / "empty.yaml", given[1:])


def test_what_a_mapping_merges_in_may_be_set_again(tmp_path: Path, rl_file: Path) -> None:
    """YAML's `<<`: the result has the key once, although two mappings have it."""
    (tmp_path / "merged.yaml").write_text(
        "extends: rl.yaml\ntrain: &t {steps: 5, keep_last: 3}\nevaluation: {num_tasks: 7}\n"
        "simulators: {user: {deployments: [&d {model: a, api_key_env: null}, {<<: *d, model: b}]}}\n"
    )
    config = load_config(RLConfig, tmp_path / "merged.yaml")
    assert [each.model for each in config.simulators.user.deployments] == ["a", "b"]
    assert config.simulators.user.deployments[1].api_key_env is None


def test_numbers_and_switches_in_their_usual_forms(rl_file: Path) -> None:
    """What pydantic reads from a command line stays: text that is a number, 3.0 for 3, null for no value."""
    usual = ["optimizer.lr=1e-5", "train.steps=3.0", "run.resume=yes", "train.packing=off", "engine.threads=null"]
    config = load_config(RLConfig, rl_file, [*usual, "run.name=v1.2_lr=3e-4@night", "run.seed=4294967295"])
    assert (config.optimizer.lr, config.train.steps, config.run.resume, config.train.packing) == (1e-5, 3, True, False)
    assert config.run.seed == 2**32 - 1


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {train: x}\n")
    with pytest.raises(UserError, match="'model' is not set"):
        load_config(SFTConfig, tmp_path / "a.yaml")
    with pytest.raises(UserError, match="no config file"):
        load_config(SFTConfig, tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("extends: c.yaml\n")
    with pytest.raises(UserError, match="cycle"):
        load_config(SFTConfig, tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(SFTConfig, tmp_path / "d.yaml")
    (tmp_path / "e.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="mapping"):
        load_config(SFTConfig, tmp_path / "e.yaml")


def test_a_key_of_an_entry_that_a_file_has_can_be_changed(tmp_path: Path, rl_file: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: rl.yaml\nsimulators: {user: {mixture: [{model: a}, {model: b, temperature: 0.5}]}}\n")
    config = load_config(RLConfig, child, ["simulators.user.mixture.1.model=c", "simulators.user.mixture.0.weight=3"])
    first, second = config.simulators.user.mixture
    assert (first.model, first.weight, second.model, second.temperature) == ("a", 3.0, "c", 0.5)
    for entry in ("2", "-1", "x"):
        with pytest.raises(UserError, match=r"mixture is a list: give the whole list, .* one of its 2 entries"):
            load_config(RLConfig, child, [f"simulators.user.mixture.{entry}.model=c"])
    with pytest.raises(UserError, match="mixture is a list"):
        load_config(RLConfig, child, ["simulators.user.mixture.0={model: c}"])


EVALUATE = """
model: {path: m}
data: {train: t.parquet, validation: v.parquet}
simulators: {user: {model: gpt-4o-mini}, judge: {model: gpt-4o-mini}}
"""


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["models.a={path: x, api: {model: y}}"], r"models\.a: path and api are both set: .* remove one of them"),
        (["models.a={proactive_prompt_file: x.txt}"], r"models\.a: .* set proactive to true"),
        (["models={a: {}, b: {}}", "compare.baseline=c"], r"compare\.baseline=c is not one of models \(a, b\)"),
        (["models={a: {}}", "compare.judged_pairs=5"], r"compare\.judged_pairs=5 compares two models"),
        (
            [
                "models={a: {}, b: {}}",
                "compare.judged_pairs=5",
                "simulators.judge=null",
                "reward.metric_weights={x: 1}",
            ],
            r"compare\.judged_pairs needs an LLM judge: set simulators\.judge",
        ),
        (
            ["models={a: {}, b: {path: x}}", "engine.urls=[http://127.0.0.1:1]"],
            "engine.urls serve one model, and `models` has 2 different ones",
        ),
        (["models={a b: {}}"], "a b"),
        (["evaluation.users.Bare={model: x}"], "Bare"),
        (["evaluation.users.bare={model: x, modl: y}"], "did you mean 'model'"),
        (
            ["evaluation.users.bare={model: x, deadline_s: 4000}"],
            r"evaluation\.timeout_s=1800 must be longer than evaluation\.users\.bare\.deadline_s=4000",
        ),
        (
            ["models.a.api={model: x, deadline_s: 4000}"],
            r"evaluation\.timeout_s=1800 must be longer than models\.a\.api\.deadline_s=4000",
        ),
    ],
)
def test_a_mistake_in_a_comparison_is_named(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(EVALUATE)
    with pytest.raises(UserError, match=sentence):
        load_config(EvaluateConfig, path, overrides)


def test_the_models_of_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(EVALUATE)
    alone = load_config(EvaluateConfig, path)
    assert (list(alone.rows), alone.served) == ([""], ["m"])
    models = "models={base: {}, base+proactive: {proactive: true}, rl: {path: x}, gpt: {api: {model: y}}}"
    several = load_config(EvaluateConfig, path, [models])
    assert (list(several.rows), several.served) == (["base", "base+proactive", "rl", "gpt"], ["m", "x"])
    assert list(several.extra_roles) == ["model-gpt"]
    fewer = load_config(EvaluateConfig, path, [models, "models.rl=null", "models.base+proactive.path=y"])
    assert (list(fewer.rows), fewer.served) == (["base", "base+proactive", "gpt"], ["m", "y"])
    users = "evaluation.users={terse: {model: a}, other: {model: b}}"
    assert list(load_config(EvaluateConfig, path, [users, "evaluation.users.terse=null"]).extra_roles) == ["user-other"]
    judged = [models, "compare={baseline: base, judged_pairs: 9}"]
    chosen = load_config(EvaluateConfig, path, judged, models=["rl"])
    assert (list(chosen.rows), chosen.served) == (["rl"], ["x"])
    assert (chosen.compare.baseline, chosen.compare.judged_pairs) == ("rl", 0)
    ordered = load_config(EvaluateConfig, path, judged, models=["gpt", "base"])
    assert (list(ordered.rows), ordered.compare.baseline, ordered.compare.judged_pairs) == (["gpt", "base"], "base", 9)
    gpt = several.models["gpt"].api
    assert gpt is not None
    assert gpt.temperature == 0.0
