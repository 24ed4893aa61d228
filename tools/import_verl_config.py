"""Turns the overrides of a verl run into a config of this project: `python tools/import_verl_config.py RUN.sh`.

    python tools/import_verl_config.py train_rl_collabllm.sh [--interaction interaction.yaml] > conf/mine.yaml

Reads words of the form a.b.c=value from a shell script, whose commands it does not run. The YAML goes to stdout; what
has another meaning here, what is not needed and what has no equal goes to stderr. The result is checked as train_rl
checks it. The keys are those of verl's recipe/collabllm of 2025 and its common ones; another version may have others,
which are then named as having no equal.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, Python finds only tools/

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import UserError, run_cli

WORD = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)
TOKENS_PER_UNIT = 1000  # token_amount counts single tokens there, thousands of them here

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
SAME: Mapping[str, str] = {
    "data.train_files": "data.train",
    "data.val_files": "data.validation",
    "data.train_batch_size": "rollout.prompts_per_step",
    "data.max_prompt_length": "rollout.max_prompt_tokens",
    "data.max_response_length": "rollout.max_new_tokens",
    "actor_rollout_ref.model.path": "model.path",
    f"{ACTOR}.optim.lr": "optimizer.lr",
    f"{ACTOR}.optim.lr_warmup_steps": "optimizer.warmup_steps",
    f"{ACTOR}.optim.weight_decay": "optimizer.weight_decay",
    f"{ACTOR}.grad_clip": "optimizer.clip_grad",
    f"{ACTOR}.entropy_coeff": "algorithm.entropy_coef",
    f"{ACTOR}.clip_ratio_low": "algorithm.clip_low",
    f"{ACTOR}.clip_ratio_high": "algorithm.clip_high",
    f"{ACTOR}.clip_ratio_c": "algorithm.clip_dual",
    f"{ACTOR}.ppo_max_token_len_per_gpu": "train.micro_batch_tokens",
    f"{ROLLOUT}.n": "rollout.num_replies",
    f"{ROLLOUT}.temperature": "rollout.temperature",
    f"{ROLLOUT}.top_p": "rollout.top_p",
    f"{ROLLOUT}.top_k": "rollout.top_k",
    f"{ROLLOUT}.tensor_model_parallel_size": "engine.tensor",
    f"{ROLLOUT}.gpu_memory_utilization": "engine.mem_fraction",
    f"{ROLLOUT}.multi_turn.max_user_turns": "rollout.max_user_turns",
    f"{ROLLOUT}.multi_turn.max_assistant_turns": "rollout.max_assistant_turns",
    f"{ROLLOUT}.multi_turn.num_repeat_rollouts": "rollout.num_repeat_rollouts",
    "trainer.experiment_name": "run.name",
    "trainer.default_local_dir": "run.dir",
    "trainer.save_freq": "train.save_interval",
    "trainer.test_freq": "train.eval_interval",
    "trainer.total_training_steps": "train.steps",
    "trainer.val_before_train": "train.eval_at_start",
    "trainer.max_actor_ckpt_to_keep": "train.keep_last",
    "reward_model.reward_kwargs.llm_judge_kwargs.model": "simulators.judge.model",
    "reward_model.reward_kwargs.llm_judge_kwargs.max_tokens": "simulators.judge.max_tokens",
    "reward_model.reward_kwargs.llm_judge_kwargs.temperature": "simulators.judge.temperature",
}
WORDS: Mapping[str, Mapping[Any, tuple[str, Any]]] = {
    "algorithm.adv_estimator": {
        "grpo": ("algorithm.preset", "grpo"),
        "rloo": ("algorithm.preset", "rloo"),
        "reinforce_plus_plus": ("algorithm.preset", "reinforce_pp"),
        "reinforce_plus_plus_baseline": ("algorithm.preset", "reinforce_pp_baseline"),
    },
    "algorithm.norm_adv_by_std_in_grpo": {
        True: ("algorithm.scale", "group_std"),
        False: ("algorithm.scale", "none"),
    },
    f"{ACTOR}.kl_loss_type": {
        name: ("algorithm.kl_estimator", ours)
        for ours, names in {"k1": ("kl", "k1"), "k2": ("mse", "k2"), "k3": ("low_var_kl", "k3")}.items()
        for name in names
    },
    f"{ACTOR}.loss_agg_mode": {
        "token-mean": ("algorithm.aggregation", "token_mean"),
        "seq-mean-token-mean": ("algorithm.aggregation", "sequence_mean"),
        "seq-mean-token-sum-norm": ("algorithm.aggregation", "constant"),
    },
    "actor_rollout_ref.model.enable_gradient_checkpointing": {
        True: ("train.recompute", "full"),
        False: ("train.recompute", "none"),
    },
    "actor_rollout_ref.model.use_remove_padding": {True: ("train.packing", True), False: ("train.packing", False)},
    f"{ACTOR}.fsdp_config.optimizer_offload": {
        True: ("optimizer.cpu_offload", 1.0),
        False: ("optimizer.cpu_offload", 0.0),
    },
}
DIFFERS: Mapping[str, str] = {
    "data.max_response_length": "there the tokens of all turns after the prompt, here of one policy turn",
    f"{ROLLOUT}.temperature": "the trainer divides its logits by it too, so that ratios are 1 on policy",
    f"{ROLLOUT}.gpu_memory_utilization": "of a GPU that trainer and engine share; leave it out, and it is derived",
    "data.train_files": "convert verl's files once: tools/prepare_dataset.py, docs/data.md",
    "data.val_files": "as data.train_files",
}
NOT_NEEDED: Mapping[str, str] = {
    "trainer.logger": "TensorBoard and metrics.jsonl are always written",
    "trainer.project_name": "run.name names all files of a run",
    "trainer.critic_warmup": "there is no critic",
    "trainer.resume": "run.resume=auto goes on where the run stopped",
    "data.filter_overlong_prompts": "prompts above rollout.max_prompt_tokens are left out and counted",
    "data.truncation": "nothing is truncated",
    "custom_reward_function": "reward.metric_modules names modules with metrics of your own",
    "reward_model.reward_manager": "rewards are those of CollabLLM",
    f"{ROLLOUT}.name": "the engine is SGLang",
    f"{ROLLOUT}.mode": "rollouts are asynchronous",
    f"{ROLLOUT}.free_cache_engine": "colocated engines release their memory while the trainer works",
    f"{ROLLOUT}.multi_turn.enable": "conversations have several turns",
    f"{ROLLOUT}.multi_turn.format": "tools are not used",
    f"{ROLLOUT}.multi_turn.interaction_config_path": "give the file as --interaction: simulators.user",
    f"{ROLLOUT}.trace": "record.every writes whole trees, shown by python -m collab_megatron.view",
    f"{ACTOR}.use_dynamic_bsz": "micro-batches always hold about train.micro_batch_tokens tokens",
    f"{ACTOR}.fsdp_config.param_offload": "parallel.tensor and parallel.pipeline divide the parameters",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "algorithm.reference=swap keeps the reference on the host",
}
HANDLED = {
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "trainer.total_epochs",
    "algorithm.use_kl_in_reward",
    "algorithm.kl_ctrl.kl_coef",
    f"{ACTOR}.use_kl_loss",
    f"{ACTOR}.kl_loss_coef",
    f"{ACTOR}.ppo_mini_batch_size",
    f"{ACTOR}.ppo_epochs",
    f"{ACTOR}.clip_ratio",
}
RECIPE_USER = "gpt-4o-mini"  # recipe/collabllm/config/collabllm_interaction_config.yaml
METRIC_WEIGHT = "reward_model.reward_kwargs.metric_weights."


@dataclass
class Imported:
    """Our keys by dotted name, and what the user should know."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str, str]] = field(default_factory=list)  # kind, verl's key, sentence

    def note(self, kind: str, key: str, sentence: str) -> None:
        self.notes.append((kind, key, sentence))


def overrides(script: str) -> dict[str, Any]:
    """Words a.b.c=value of a shell script, the last of equal ones; environment variables are put in where they are set.

    Raises UserError for a script whose quotes do not match.
    """
    try:
        words = shlex.split(script.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UserError(f"the script cannot be split into words: {error}") from None
    found = {}
    for word in words:
        if match := WORD.fullmatch(word):
            found[match[1]] = _value(os.path.expandvars(match[2]))
    return found


def _value(text: str) -> Any:
    """As Hydra reads it: a number, a switch, null or text."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(found, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", found):
        return float(found)  # YAML 1.1 reads 1e-6 as text
    return found if isinstance(found, bool | int | float | list) or found is None else text


def convert(verl: Mapping[str, Any], interaction: Mapping[str, Any] | None = None) -> Imported:
    """Translate verl's keys. Raises UserError for a value without an equal that would change what is trained."""
    result = Imported()
    for key, value in verl.items():
        if key in DIFFERS:
            result.note("differs", key, DIFFERS[key])
        if key in SAME:
            result.values[SAME[key]] = value
        elif key in WORDS:
            if value not in WORDS[key]:
                known = ", ".join(str(word) for word in WORDS[key])
                raise UserError(f"{key}={value} has no equal here; what has: {known}")
            ours, translated = WORDS[key][value]
            result.values[ours] = translated
        elif key.startswith(METRIC_WEIGHT):
            name = key.removeprefix(METRIC_WEIGHT)
            per_unit = TOKENS_PER_UNIT if name == "token_amount" else 1
            # rounded: 0.0001 * 1000 is 0.1 and some
            result.values.setdefault("reward.metric_weights", {})[name] = round(value * per_unit, 12)
            if name == "token_amount":
                result.note("differs", key, "there a weight for each token, here for each 1,000")
        elif reason := _prefix(NOT_NEEDED, key):
            result.note("not needed", key, reason)
        elif key not in HANDLED:
            result.note("no equal", key, f"{value!r} is left out")
    for rule in (_clip, _kl, _mini_batches, _length, _ranks):
        rule(verl, result)
    _simulators(interaction, result)
    return result


def _prefix(table: Mapping[str, str], key: str) -> str | None:
    return next((reason for start, reason in table.items() if key.startswith(start)), None)


def _clip(verl: Mapping[str, Any], result: Imported) -> None:
    if (clip := verl.get(f"{ACTOR}.clip_ratio")) is not None:
        result.values.setdefault("algorithm.clip_low", clip)
        result.values.setdefault("algorithm.clip_high", clip)


def _kl(verl: Mapping[str, Any], result: Imported) -> None:
    """verl has two switches and two coefficients; here one coefficient and where it acts."""
    if verl.get("algorithm.use_kl_in_reward", False):
        if verl.get(f"{ACTOR}.use_kl_loss", False):
            raise UserError("a KL in the loss and another in the reward have no equal here: choose one")
        result.values |= {
            "algorithm.kl_in": "reward",
            "algorithm.kl_coef": verl.get("algorithm.kl_ctrl.kl_coef", 0.001),
        }
    else:
        used = verl.get(f"{ACTOR}.use_kl_loss", False)
        result.values["algorithm.kl_coef"] = verl.get(f"{ACTOR}.kl_loss_coef", 0.001) if used else 0.0


def _mini_batches(verl: Mapping[str, Any], result: Imported) -> None:
    if verl.get(f"{ACTOR}.ppo_epochs", 1) != 1:
        raise UserError(f"{ACTOR}.ppo_epochs={verl[f'{ACTOR}.ppo_epochs']} has no equal here: a batch is used once")
    prompts, each = verl.get("data.train_batch_size"), verl.get(f"{ACTOR}.ppo_mini_batch_size")
    if prompts is None or each is None:
        return
    if prompts % each:
        raise UserError(f"data.train_batch_size={prompts} is no multiple of {ACTOR}.ppo_mini_batch_size={each}")
    result.values["algorithm.mini_batches"] = prompts // each


def _length(verl: Mapping[str, Any], result: Imported) -> None:
    epochs = verl.get("trainer.total_epochs")
    if epochs is not None and "train.steps" not in result.values:
        result.values["train.epochs"] = epochs
    if result.values.get("train.eval_interval", 0) < 0:  # never
        result.values["train.eval_interval"] = 0


def _ranks(verl: Mapping[str, Any], result: Imported) -> None:
    """verl's hybrid engine: trainer and engines share all GPUs; its FSDP is data-parallel."""
    gpus = verl.get("trainer.nnodes", 1) * verl.get("trainer.n_gpus_per_node", 8)
    result.values |= {
        "parallel.data": gpus,
        "engine.placement": "colocated",
        "engine.count": gpus // result.values.get("engine.tensor", 1),
    }
    result.note(
        "differs",
        "trainer.n_gpus_per_node",
        f"parallel.data={gpus} replicas with a sharded optimizer; FSDP divides parameters too: see what fits with "
        "--dry-run, and raise parallel.tensor",
    )


def _simulators(interaction: Mapping[str, Any] | None, result: Imported) -> None:
    if interaction is None:
        result.values["simulators.user.model"] = RECIPE_USER
        result.note(
            "differs", f"{ROLLOUT}.multi_turn", f"the user is {RECIPE_USER}, as in the recipe: --interaction FILE"
        )
        return
    for theirs, value in interaction.items():
        ours = {"user_model": "model", "max_tokens": "max_tokens", "temperature": "temperature"}.get(theirs)
        if ours is not None:
            result.values[f"simulators.user.{ours}"] = value
        elif theirs == "num_retries":
            result.values["simulators.user.max_attempts"] = value + 1
        elif theirs != "enable_log":
            result.note("no equal", f"interaction.{theirs}", f"{value!r} is left out")


def read_interaction(path: Path) -> Mapping[str, Any]:
    """The config of the first interaction of verl's file. Raises UserError."""
    try:
        found = yaml.safe_load(path.read_text())["interaction"][0]["config"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        raise UserError(f"{path} is no interaction config of verl: it has no interaction[0].config") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no interaction config of verl: interaction[0].config is no mapping")
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        section, _, name = dotted.rpartition(".")
        place = tree
        for part in section.split("."):
            place = place.setdefault(part, {})
        place[name] = value
    return tree


def checked(tree: Mapping[str, Any]) -> str:
    """As YAML. Raises UserError where train_rl would refuse it."""
    text = yaml.safe_dump(dict(tree), sort_keys=False, width=100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "imported.yaml"
        path.write_text(text)
        load_config(RLConfig, path)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/import_verl_config.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="the shell script of the run; - reads stdin")
    parser.add_argument("--interaction", type=Path, help="verl's interaction config: the simulated user")
    args = parser.parse_args()
    try:
        script = sys.stdin.read() if str(args.script) == "-" else args.script.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {args.script}: {error}") from None
    verl = overrides(script)
    if not verl:
        raise UserError(f"{args.script} has no word of the form a.b.c=value: is it the script of a verl run?")
    result = convert(verl, read_interaction(args.interaction) if args.interaction else None)
    sys.stdout.write(checked(nested(result.values)))
    for kind in ("differs", "no equal", "not needed"):
        for _, key, sentence in (note for note in result.notes if note[0] == kind):
            print(f"{kind}: {key}: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
