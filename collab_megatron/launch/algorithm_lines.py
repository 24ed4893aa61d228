"""The algorithm of a run in the plan: the pieces that its name stands for, with the config's changes."""

from __future__ import annotations

from collab_megatron.config.sections import AlgorithmSection, DriverSection, PreferenceSection, RolloutSection

BASELINES = {
    "group": "the group's mean",
    "leave_one_out": "the mean of the group's other replies",
    "batch": "the mean over the step's tokens",
}
TREE_BASELINES = {
    "siblings": "what other conversations through the same contexts return",
    "group": "the mean of the group's other conversations",
}
SCALES = {"none": "", "batch_std": ", divided by the std over the step's tokens"}
AGGREGATIONS = {
    "token_mean": "mean over tokens",
    "sequence_mean": "mean over each reply's tokens, then over replies",
    "constant": "sum over tokens / (replies x {longest})",
}


def algorithm_lines(algorithm: AlgorithmSection, rollout: RolloutSection, driver: DriverSection) -> list[str]:
    """What of the config's pieces makes the gradient, one line for each kind of piece."""
    a = algorithm
    scale = f", divided by the group's std + {a.advantage_eps:g}" if a.scale == "group_std" else SCALES[a.scale]
    lines = [f"algorithm   {a.preset}: reward minus {BASELINES[a.baseline]}{scale}"]
    if a.credit == "tree":
        lines.append(f"later policy turns are trained too: their return minus {TREE_BASELINES[a.tree_baseline]}{scale}")
    if a.overlong_share:
        longest, buffer = rollout.max_new_tokens, round(a.overlong_share * rollout.max_new_tokens)
        lines.append(f"a reply loses up to {a.overlong_penalty:g} of reward in the last {buffer} of {longest} tokens")
    if a.baseline != "batch":
        lines.append(_groups_without_spread(a, driver))
    lines.append(f"{_surrogate(a)}, {AGGREGATIONS[a.aggregation].format(longest=rollout.max_new_tokens)}")
    kl = f"KL {a.kl_estimator} x {a.kl_coef:g} in the {a.kl_in}" if a.kl_coef else "no KL"
    entropy = f", entropy bonus x {a.entropy_coef:g}" if a.entropy_coef else ""
    lines.append(f"{kl}{entropy}; {_importance(a)}")
    return [lines[0], *(f"            {line}" for line in lines[1:])]


def online_dpo_lines(online: PreferenceSection, algorithm: AlgorithmSection) -> list[str]:
    """The same for online DPO, which takes the place of the policy gradient."""
    return [
        f"algorithm   online DPO, beta {online.beta:g}: the best reply of each group against its worst",
        f"            groups whose rewards have a std below {algorithm.min_group_std:g}, or a gap of at most "
        f"{online.min_gap:g}, give no pair",
    ]


def _groups_without_spread(a: AlgorithmSection, driver: DriverSection) -> str:
    fate = "kept with advantage 0" if a.zero_advantage == "keep" else "not trained"
    replaced = f", and up to {driver.refill_groups} a step replaced" if driver.refill_groups else ""
    return f"groups whose rewards have a std below {a.min_group_std:g} are {fate}{replaced}"


def _surrogate(a: AlgorithmSection) -> str:
    limits = f"[{max(0.0, 1 - a.clip_low):g}, {1 + a.clip_high:g}]"
    if a.policy_loss == "cispo":
        return f"each token's ratio, clipped to {limits}, as the weight of its log-prob"
    whose = "each reply's mean ratio" if a.policy_loss == "gspo" else "each token's ratio"
    dual = f" and by {a.clip_dual:g} for negative advantages" if a.clip_dual is not None else ""
    return f"{whose}, clipped to {limits}{dual}"


def _importance(a: AlgorithmSection) -> str:
    if a.importance == "none":
        return "no importance weights"
    whose = "each token" if a.importance == "token" else "each reply"
    if a.importance_beyond == "mask":
        return f"importance weight of {whose}, 0 outside [{a.importance_floor:g}, {a.importance_cap:g}]"
    return f"importance weight of {whose}, at most {a.importance_cap:g}"
