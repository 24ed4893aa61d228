"""Algorithms by name: each expands to the pieces of AlgorithmSection (docs/algorithms.md). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "dapo", "gspo", "cispo"]
Baseline = Literal["group", "leave_one_out", "batch"]
Scale = Literal["group_std", "batch_std", "none"]
PolicyLoss = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]
ImportanceLevel = Literal["token", "sequence", "none"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"scale": "none", "aggregation": "constant"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "reinforce_pp": {"baseline": "batch", "scale": "batch_std", "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce_pp_baseline": {"scale": "batch_std", "kl_estimator": "k2"},
    # dynamic sampling is zero_advantage=drop with driver.refill_groups; the paper has no KL term
    "dapo": {"clip_high": 0.28, "kl_coef": 0.0, "zero_advantage": "drop", "overlong_share": 0.2},
    # the paper's clip range: a mean over tokens varies far less than a token
    "gspo": {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    # clip_low=1 allows every ratio below 1: the paper bounds the weight from above only
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0},
}
"""Changes of the defaults, which are GRPO's. Keys that the config sets win."""


def expanded(values: Any) -> Any:
    """A section as a config writes it (a mapping, or an algorithm's name) with the pieces of its preset.

    Raises ValueError for an unknown name.
    """
    if isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, dict) or "preset" not in values:
        return values
    name = values["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"algorithm.preset={name!r} is not one of {', '.join(PRESETS)}: choose one of these")
    return {**PRESETS[name], **values}


def check_pieces(
    *,
    baseline: Baseline,
    scale: Scale,
    zero_advantage: Literal["keep", "drop"],
    policy_loss: PolicyLoss,
    clip_dual: float | None,
    kl_coef: float,
    kl_in: Literal["loss", "reward"],
    importance: ImportanceLevel,
    importance_beyond: Literal["truncate", "mask"],
    importance_cap: float,
    importance_floor: float,
) -> None:
    """Raise ValueError for pieces that mean nothing together."""
    if baseline == "batch" and scale != "batch_std":
        raise ValueError(
            f"algorithm.baseline=batch subtracts the mean of all replies of the step, so scale={scale} has nothing to "
            "scale by: set algorithm.scale=batch_std"
        )
    if baseline == "leave_one_out" and scale == "group_std":
        raise ValueError(
            "algorithm.baseline=leave_one_out with scale=group_std is GRPO times n / (n - 1): set "
            "algorithm.scale=none, or algorithm.baseline=group"
        )
    if baseline == "batch" and zero_advantage == "drop":
        raise ValueError(
            "algorithm.zero_advantage=drop drops groups without spread, but with algorithm.baseline=batch these differ "
            "from other groups and teach something: set algorithm.zero_advantage=keep"
        )
    if clip_dual is not None and policy_loss != "ppo":
        raise ValueError(
            f"algorithm.clip_dual={clip_dual:g} bounds PPO's surrogate, which policy_loss={policy_loss} does not have: "
            "set algorithm.clip_dual=null"
        )
    if policy_loss == "gspo" and kl_coef and kl_in == "reward" and baseline == "batch":
        raise ValueError(
            "algorithm.policy_loss=gspo needs one advantage per reply, but kl_in=reward with baseline=batch gives "
            "every token its own: set algorithm.kl_in=loss, or algorithm.baseline=group"
        )
    _check_importance(importance, importance_beyond, importance_cap, importance_floor)


def _check_importance(
    importance: ImportanceLevel, beyond: Literal["truncate", "mask"], cap: float, floor: float
) -> None:
    if importance == "none" and (beyond == "mask" or floor):
        raise ValueError(
            "algorithm.importance=none computes no weight to mask or to bound: remove importance_beyond and "
            "importance_floor, or set algorithm.importance=token"
        )
    if floor and beyond == "truncate":
        raise ValueError(
            f"algorithm.importance_floor={floor:g} is the lower limit of importance_beyond=mask: set that, or "
            "importance_floor=0"
        )
    if beyond == "mask" and not floor <= 1.0 <= cap:
        raise ValueError(
            f"algorithm.importance_floor={floor:g} and importance_cap={cap:g} mask a weight of 1, which every "
            "token has where trainer and engine agree: choose limits on both sides of 1"
        )


def check_tree_credit(baseline: Baseline, kl_coef: float, kl_in: Literal["loss", "reward"]) -> None:
    """Raise ValueError for pieces that mean nothing for the later turns of credit: tree."""
    if baseline == "batch":
        raise ValueError(
            "algorithm.credit=tree compares later turns inside their group, but baseline=batch compares replies with "
            "those of all groups: set algorithm.baseline=group, or algorithm.credit=reply"
        )
    if kl_coef and kl_in == "reward":
        raise ValueError(
            "algorithm.credit=tree compares later turns before the trainer knows the KL that kl_in=reward subtracts: "
            "set algorithm.kl_in=loss, or algorithm.credit=reply"
        )


def check_refills(baseline: Baseline, refill_groups: int) -> None:
    """Raise ValueError where dynamic sampling means nothing."""
    if refill_groups and baseline == "batch":
        raise ValueError(
            f"driver.refill_groups={refill_groups} replaces groups without spread, but with algorithm.baseline=batch "
            "these differ from other groups and teach something: set driver.refill_groups=0"
        )
