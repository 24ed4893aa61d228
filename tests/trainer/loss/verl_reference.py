"""Run by test_verl.py in a process of its own: verl's core_algos on the cases of a file.

    verl_reference.py WHEEL INPUTS OUTPUTS

WHEEL: the unpacked wheel. INPUTS, OUTPUTS: torch files. verl imports packages of its cluster side, which are not there;
each gets a stand-in, which none of the functions called here uses.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

ABSENT = ("ray", "omegaconf", "tensordict", "hydra", "codetiming", "peft", "torchdata", "pylatexenc", "wandb", "dill")
MEANS = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}


class StandIn(ModuleType):
    """A module with any name in it."""

    __path__ = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # a class where one may be inherited from or named in an annotation
        return type(name, (), {}) if name[0].isupper() and not name.isupper() else MagicMock(name=name)


class StandIns(importlib.abc.Loader):
    """Finder of stand-ins; asked after all others."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs."""


def gradient(loss: Tensor, logprobs: Tensor) -> dict[str, Tensor]:
    (found,) = torch.autograd.grad(loss, logprobs)
    return {"loss": loss.detach(), "gradient": found}


def overlong_rewards(shape: dict[str, Any]) -> Tensor:
    """What verl's DAPO reward manager makes of a score of 0 for each length."""
    import verl

    verl.DataProto = StandIn("DataProto")
    from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager

    async def score(**given: Any) -> float:
        return 0.0

    async def reward(tokens: int) -> float:
        manager = object.__new__(DAPORewardManager)  # without the cluster side
        manager.loop, manager.compute_score, manager.is_async_reward_score = asyncio.get_running_loop(), score, True
        manager.tokenizer, manager.reward_router_address = MagicMock(), None
        manager.max_resp_len = shape["longest"]
        manager.overlong_buffer_cfg = SimpleNamespace(
            enable=True, len=shape["buffer"], penalty_factor=shape["penalty"], log=False
        )
        attended = torch.zeros(shape["longest"], dtype=torch.long)
        attended[:tokens] = 1
        batch = {"responses": torch.zeros(shape["longest"], dtype=torch.long), "attention_mask": attended}
        about = {"data_source": "", "reward_model": {"ground_truth": ""}}
        found = await manager.run_single([SimpleNamespace(batch=batch, non_tensor_batch=about)])
        return float(found["reward_score"])

    return torch.tensor([asyncio.run(reward(tokens)) for tokens in shape["lengths"]], dtype=torch.float64)


def main() -> None:
    wheel, inputs, outputs = map(Path, sys.argv[1:])
    sys.meta_path.append(StandIns())
    sys.path.insert(0, str(wheel))
    package = ModuleType("verl")  # without its __init__, which starts the cluster side
    package.__path__ = [str(wheel / "verl")]
    sys.modules["verl"] = package
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos as core
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
    from verl.workers.config import ActorConfig

    given = torch.load(inputs, weights_only=True)
    mask, old, kl = given["mask"], given["old"], given["kl"]
    group = given["group"].numpy()
    at_end = torch.zeros_like(mask)
    at_end[torch.arange(len(mask)), mask.sum(-1).long() - 1] = given["rewards"]
    with_kl = at_end - given["kl_coef"] * kl * mask
    found: dict[str, Any] = {
        "grpo": core.compute_grpo_outcome_advantage(at_end.clone(), mask, group, epsilon=1e-6)[0],
        "dr_grpo": core.compute_grpo_outcome_advantage(at_end.clone(), mask, group, norm_adv_by_std_in_grpo=False)[0],
        "rloo": core.compute_rloo_outcome_advantage(at_end.clone(), mask, group)[0],
        "reinforce_pp_baseline": core.compute_reinforce_plus_plus_baseline_outcome_advantage(
            at_end.clone(), mask, group
        )[0],
        "reinforce_pp": core.compute_reinforce_plus_plus_outcome_advantage(
            at_end.clone(), mask, config=AlgoConfig(gamma=1.0)
        )[0],
        "reinforce_pp with kl": core.compute_reinforce_plus_plus_outcome_advantage(
            with_kl, mask, config=AlgoConfig(gamma=1.0)
        )[0],
        "grpo with kl": core.compute_grpo_outcome_advantage(with_kl.clone(), mask, group, epsilon=1e-6)[0],
    }
    for kind, (low, high) in given["clips"].items():
        for ours, theirs in MEANS.items():
            config = ActorConfig(
                strategy="fsdp",
                rollout_n=4,
                use_dynamic_bsz=True,
                clip_ratio_low=low,
                clip_ratio_high=high,
                clip_ratio_c=3.0,
            )
            if ours == "constant":
                config.global_batch_info["loss_scale_factor"] = given["longest"]
            logprobs = given["logprobs"].clone().requires_grad_()
            loss, _ = core.get_policy_loss_fn({"ppo": "vanilla"}.get(kind, kind))(
                old,
                logprobs,
                given["advantages"],
                mask,
                loss_agg_mode=theirs,
                config=config,
                rollout_is_weights=given["weights"],
            )
            found[f"{kind} {ours}"] = gradient(loss, logprobs)
    for kind in ("k1", "k2", "k3"):
        logprobs = given["logprobs"].clone().requires_grad_()
        estimate = core.kl_penalty(logprobs, given["reference"], kind)
        found[kind] = {"values": estimate.detach(), **gradient((estimate * mask).sum(), logprobs)}
    for ours, theirs in MEANS.items():
        logits = given["logits"].clone().requires_grad_()
        if ours != "constant":  # its entropy loss knows no constant
            found[f"entropy {ours}"] = gradient(core.compute_entropy_loss(logits, mask, theirs), logits)
    found["overlong"] = overlong_rewards(given["overlong"])
    for level in ("token", "sequence"):
        for name, threshold in (("truncate", 1.5), ("mask", "0.6_1.5")):
            found[f"{level} {name}"] = compute_rollout_correction_weights(
                old - given["rollout"], mask, rollout_is=level, rollout_is_threshold=threshold
            )[0]
    torch.save(found, outputs)


if __name__ == "__main__":
    main()
