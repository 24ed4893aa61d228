"""A miniature of one of the paper's tasks from the single-turn dataset to the evaluation: every stage is a command.

model -> endpoint -> conversations -> rows for SFT, DPO and RL -> SFT -> DPO -> RL -> evaluation

The configs are conf/mini/TASK_{data,sft,dpo,rl}.yaml. Nothing is learned in so few steps; the road is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from collab_megatron.demo.pipeline import DemoPipeline, DemoSettings, refuse_used_folder
from collab_megatron.launch.supervisor import Supervisor

MiniTask = Literal["math", "medium", "bigcodebench"]
MAX_TOKENS = "768"  # of a row; the model has 1024 positions


class MiniPipeline(DemoPipeline):
    """The stages of one task. `overrides`: stage -> more a.b=c."""

    def __init__(
        self,
        task: MiniTask,
        run_dir: Path,
        repository: Path,
        *,
        seed: int = 1,
        overrides: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(DemoSettings(run_dir, seed, overrides=overrides or {}), repository)
        self._task, self._seed, self._conf = task, seed, repository / "conf" / "mini"

    def run(self) -> dict[str, Any]:
        """Run all stages; returns the figures of the evaluation."""
        with Supervisor(self.run_dir / "logs") as supervisor:
            self._write_model()
            self.start_endpoint(supervisor, "--items", str(self._conf))
            self._build()
            self._prepare()
            self._supervised("sft", self.run_dir / "model")
            self._supervised("dpo", self.run_dir / "sft_hf")
            self._policy("rl", "collab_megatron.train_rl")
            self._policy("evaluate", "collab_megatron.evaluate")
        figures: dict[str, Any] = json.loads((self.run_dir / "evaluation.json").read_text())
        return figures

    def _write_model(self) -> None:
        argv = ["-m", "collab_megatron.demo.tiny_model", "--output", str(self.run_dir / "model")]
        self.stage("model", [*argv, "--seed", str(self._seed), "--texts", str(self._conf / f"{self._task}.jsonl")])

    def _build(self) -> None:
        argv = ["tools/build_dataset.py", self._config("data"), *self.roles("user", "judge", "assistant")]
        argv += [f"problems={self._conf / self._task}.jsonl", f"output={self.run_dir / 'multiturn'}"]
        argv += [f"tokenizer={self.run_dir / 'model'}", f"seed={self._seed}", *self.extra_overrides("data")]
        self.stage("data", argv)

    def _prepare(self) -> None:
        argv = ["tools/prepare_dataset.py", "--dataset", str(self.run_dir / "multiturn")]
        argv += ["--output", str(self.run_dir / "data"), "--tokenizer", str(self.run_dir / "model")]
        argv += ["--max-tokens", MAX_TOKENS, "--validation-share", "0.2"]
        for kind, more in (("rl", ["--turns", "first"]), ("sft", []), ("dpo", ["--minimum-gap", "0.02"])):
            self.stage("data", [*argv, "--dataset-type", kind, *more])

    def _supervised(self, kind: Literal["sft", "dpo"], model: Path) -> None:
        argv = ["-m", f"collab_megatron.train_{kind}", self._config(kind), *self._run(), f"model.path={model}"]
        argv += [f"data.train={self.run_dir / 'data' / f'{kind}_train.parquet'}"]
        self.stage(kind, [*argv, f"export_hf={self.run_dir / f'{kind}_hf'}", *self.extra_overrides(kind)])

    def _policy(self, stage: Literal["rl", "evaluate"], module: str) -> None:
        argv = ["-m", module, self._config("rl"), *self._run(), *self.roles("user", "judge"), *self._rl_data()]
        if stage == "rl":
            argv += [f"model.path={self.run_dir / 'sft_hf'}"]
        else:
            argv += [f"model.path={self.run_dir / 'checkpoints' / 'rl'}", f"output={self.run_dir / 'evaluation.json'}"]
        self.stage(stage, [*argv, *self.extra_overrides(stage)])

    def _config(self, kind: str) -> str:
        return str(self._conf / f"{self._task}_{kind}.yaml")

    def _run(self) -> list[str]:
        return [f"run.dir={self.run_dir}", f"run.seed={self._seed}"]


def run_mini(
    task: MiniTask, run_dir: Path, repository: Path, *, seed: int = 1, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one miniature in a new folder; returns the figures of its evaluation. `overrides`: of the stages that score.
    Raises UserError for a used folder."""
    refuse_used_folder(run_dir)
    scoring = dict.fromkeys(("data", "rl", "evaluate"), tuple(overrides))
    return MiniPipeline(task, run_dir, repository, seed=seed, overrides=scoring).run()
