"""Rows of the table of bad inputs: config files and overrides that are no config."""

from __future__ import annotations

from pathlib import Path

from tests.config.table import Row, World

DEEP = 800  # levels


def rl(name: str, *says: str, override: str | tuple[str, ...] = (), config: str | bytes | None = None) -> Row:
    overrides = (override,) if isinstance(override, str) else override
    return Row(name, "train_rl", overrides, says, config=config)


def _cycle(own: Path, world: World) -> None:
    (own / "a.yaml").write_text("extends: b.yaml\n")
    (own / "b.yaml").write_text("extends: a.yaml\n")


FILES = [
    Row("no-config", "train_rl", ("CONFIG=DIR/none.yaml",), ("none.yaml", "check the path")),
    Row("config-is-a-folder", "train_rl", ("CONFIG=DIR",), ("cannot be read", "directory")),
    rl("config-not-utf8", "own.yaml", "utf-8", config=b"run: {name: \xff\xfe}\n"),
    rl("config-binary", "own.yaml", "not valid YAML", config=b"\x00\x01\x02"),
    rl("yaml-tab", "own.yaml", "not valid YAML", "line 2", config="train:\n\tsteps: 3\n"),
    rl("yaml-unclosed", "own.yaml", "not valid YAML", config="train: [1\nrun: 2"),
    rl("yaml-list", "own.yaml", "mapping of sections", "list", config="- 1\n"),
    rl("yaml-text", "own.yaml", "mapping of sections", config="hello\n"),
    rl("yaml-number", "own.yaml", "mapping of sections", config="5\n"),
    rl("yaml-empty", "model", "not set", config=""),
    rl("yaml-two-documents", "own.yaml", "document", config="run: {}\n---\nrun: {}\n"),
    rl("yaml-python-tag", "own.yaml", "python", config="run: !!python/object/apply:os.getcwd []\n"),
    rl("yaml-unknown-tag", "own.yaml", "!secret", config="run: {name: !secret x}\n"),
    rl("yaml-unknown-alias", "own.yaml", "alias", config="run: *there\n"),
    rl("yaml-bad-merge", "own.yaml", "not valid YAML", config="run: {<<: 5}\n"),
    rl("yaml-list-as-key", "own.yaml", "not valid YAML", config="run: {[1, 2]: 3}\n"),
    rl("yaml-deep-list", "own.yaml", "nested", config="run: " + "[" * DEEP + "]" * DEEP + "\n"),
    rl("yaml-deep-mapping", "own.yaml", "nested", config="run: " + "{a: " * DEEP + "1" + "}" * DEEP + "\n"),
    rl("yaml-in-itself", "run.name", config="extends: BASE\nrun: &r {name: [*r]}\n"),
    rl("yaml-list-in-itself", "data.train", config="extends: BASE\ndata: {train: &a [*a]}\n"),
    rl("yaml-number-key", "own.yaml", "1", "quote", config="extends: BASE\ntrain: {1: 2}\n"),
    rl("yaml-bool-key", "own.yaml", "true", "quote", config="extends: BASE\nyes: {steps: 2}\n"),
    rl("yaml-null-key", "own.yaml", "null", "quote", config="extends: BASE\nnull: {steps: 2}\n"),
    rl("yaml-no-date", "own.yaml", "not valid YAML", config="extends: BASE\nrun: {name: 2020-13-45}\n"),
    rl("yaml-date", "run.name", "string", config="extends: BASE\nrun: {name: 2020-01-01}\n"),
    rl("duplicate-section", "own.yaml", "'run'", "duplicate", "line 2", config="run: {name: a}\nrun: {name: b}\n"),
    rl(
        "duplicate-key",
        "own.yaml",
        "'steps'",
        "duplicate",
        config="extends: BASE\ntrain:\n  steps: 5\n  steps: 6\n",
    ),
    rl(
        "duplicate-key-in-a-list",
        "'model'",
        "duplicate",
        config="extends: BASE\nsimulators: {user: {deployments: [{model: a, model: b}]}}\n",
    ),
    rl(
        "duplicate-key-in-an-override",
        "optimizer=",
        "'lr'",
        "duplicate",
        override="optimizer={lr: 1.0e-3, lr: 2.0e-3}",
    ),
]

EXTENDS = [
    rl("extends-number", "extends", "5", "name", config="extends: 5\n"),
    rl("extends-list-of-numbers", "extends", "5", "name", config="extends: [5]\n"),
    rl("extends-mapping", "extends", "mapping", config="extends: {a: b}\n"),
    rl("extends-bool", "extends", "true", config="extends: true\n"),
    rl("extends-list-in-a-list", "extends", "list", config="extends: [[a.yaml]]\n"),
    rl("extends-missing", "none.yaml", "check the path", config="extends: none.yaml\n"),
    rl("extends-folder", "cannot be read", config="extends: ..\n"),
    rl("extends-nul", "extends", config='extends: "a\\0b"\n'),
    rl("extends-over-long", "cannot be read", config="extends: " + "a" * 300 + "\n"),
    rl("extends-empty", "extends", "name", config='extends: ""\n'),
    Row("extends-cycle", "train_rl", ("CONFIG=DIR/a.yaml",), ("extends", "cycle"), prepare=_cycle),
]

SECTIONS = [
    rl("section-number", "train", "section", "5", config="extends: BASE\ntrain: 5\n"),
    rl("section-list", "train", "section", "list", config="extends: BASE\ntrain: [steps]\n"),
    rl("section-text", "rollout", "section", config="extends: BASE\nrollout: none\n"),
    rl("section-null", "train", "empty", "remove", config="extends: BASE\ntrain:\n"),
    rl("section-null-by-override", "optimizer", "empty", override="optimizer=null"),
    rl("model-null", "model", "empty", config="extends: BASE\nmodel:\n"),
    rl("deployments-mapping", "simulators.user.deployments", "list", override="simulators.user.deployments={model: a}"),
    rl("deployment-text", "simulators.user.deployments.0", "section", override="simulators.user.deployments=[gpt]"),
    rl("mixture-number", "simulators.user.mixture.0", "section", override="simulators.user.mixture=[5]"),
]

UNKNOWN = [
    rl("unknown-section", "'trian'", "train", config="extends: BASE\ntrian: {steps: 5}\n"),
    rl("unknown-key", "train.stepz", "'steps'", override="train.stepz=3"),
    rl("unknown-key-far-from-all", "train.qqq", "known keys", override="train.qqq=3"),
    rl(
        "unknown-key-of-deployment",
        "deployments.0.modle",
        "'model'",
        override="simulators.user.deployments=[{modle: a}]",
    ),
    rl(
        "unknown-key-of-deployment-2",
        "simulators.judge.deployments.1.api_bse",
        "'api_base'",
        override="simulators.judge.deployments=[{model: a}, {model: b, api_bse: c}]",
    ),
    rl(
        "unknown-key-of-mixture",
        "simulators.user.mixture.0.wieght",
        "'weight'",
        override="simulators.user.mixture=[{model: a, wieght: 2}]",
    ),
    rl(
        "unknown-key-of-mixture-deployment",
        "simulators.user.mixture.0.deployments.0.x",
        "known keys",
        override="simulators.user.mixture=[{model: a, deployments: [{model: a, x: 1}]}]",
    ),
    rl(
        "unknown-key-of-metric-judge",
        "reward.judges.accuracy.modell",
        "'model'",
        override="reward.judges={accuracy: {modell: a}}",
    ),
    rl("unknown-key-of-health", "simulators.health.wran", "'warn'", override="simulators.health={wran: {}}"),
    rl("unknown-key-of-evaluation", "evaluation.nun_tasks", "'num_tasks'", override="evaluation.nun_tasks=3"),
    Row("unknown-key-sft", "train_sft", ("batch_sise=3",), ("'batch_sise'", "'batch_size'")),
    Row("unknown-key-evaluate", "evaluate", ("outputt=3",), ("'outputt'", "'output'")),
    Row("unknown-key-build", "build", ("proceses=3",), ("'proceses'", "'processes'")),
    rl("missing-model", "'model'", "not set", config="data: {train: a}\nsimulators: {user: {model: m}}\n"),
    rl(
        "missing-model-of-mixture",
        "simulators.user.mixture.0.model",
        "not set",
        override="simulators.user.mixture=[{}]",
    ),
    rl("section-of-sft-in-rl", "'batch_size'", "known keys", override="batch_size=3"),
]

OVERRIDES = [
    rl("override-without-value", "train.steps", "section.key=value", override="train.steps"),
    rl("override-without-key", "=3", "section.key=value", override="=3"),
    rl("override-empty-section", ".steps=3", "section.key=value", override=".steps=3"),
    rl("override-two-dots", "train..steps", "section.key=value", override="train..steps=3"),
    rl("override-ends-with-a-dot", "train.", "section.key=value", override="train.=3"),
    rl("override-space", "train. steps", "section.key=value", override="train. steps=3"),
    rl("override-below-a-value", "train.steps", "not a section", override="train.steps.x=3"),
    rl(
        "override-into-a-list",
        "deployments",
        "list",
        override=("simulators.user.deployments=[{model: a}]", "simulators.user.deployments.1.model=b"),
    ),
    rl("override-bad-yaml", "train.steps=[", "not valid YAML", override="train.steps=["),
    rl("override-deep", "run.name", "nested", override="run.name=" + "[" * DEEP),
    rl("override-no-value", "optimizer.lr", "number", override="optimizer.lr="),
    rl("override-python-tag", "run.name", "not valid YAML", override="run.name=!!python/name:os.system"),
    Row("two-configs", "train_rl", ("BASE",), ("override", "section.key=value")),
]

ROWS = (*FILES, *EXTENDS, *SECTIONS, *UNKNOWN, *OVERRIDES)
