"""Advantages, surrogates, means, KL, entropy bonus, overlong shaping, importance weights against verl itself, in fp64.

verl's wheel is installed without its dependencies in a folder of its own, and runs in a process of its own
(verl_reference.py). Skipped, with pip's reason, where the wheel cannot be had.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.rollout.advantages import group_advantages, overlong_shaping
from collab_megatron.trainer.loss.importance import limited, raw_weights
from collab_megatron.trainer.loss.kl import kl_estimate
from collab_megatron.trainer.step_advantages import step_advantages
from collab_megatron.types import TrainingSample
from tests.trainer.loss.cases import GROUPS, LENGTHS, LONGEST, random_step

WHEEL = "verl==0.9.1 --hash=sha256:db6e6f2a8d9d5808d9ec32d357a42319fdc6967df688ff9d9810050f49bfdd14"
PROGRAM = Path(__file__).with_name("verl_reference.py")
STEP = random_step(7)
KL_COEF = 0.1
KL = (STEP.old - STEP.reference) * STEP.mask  # k1
BOUNDS = {"reinforce_pp": 1e-8, "reinforce_pp_baseline": 1e-8}  # verl's mean over tokens divides by their count + 1e-8
LOGITS = torch.randn(*STEP.mask.shape, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OVERLONG: dict[str, Any] = {"longest": 100, "buffer": 20, "penalty": 0.5, "lengths": [1, 79, 80, 81, 90, 99, 100]}
CLIPS = {"ppo": (0.2, 0.3), "gspo": (0.05, 0.1), "cispo": (0.2, 0.3)}

pytestmark = pytest.mark.slow


def installed(folder: Path) -> Path:
    """The unpacked wheel, installed once per pytest cache; skips the tests if pip cannot get it."""
    target = folder / "site"
    if (target / "verl").is_dir():
        return target
    requirements, part = folder / "requirements.txt", Path(tempfile.mkdtemp(dir=folder))
    requirements.write_text(WHEEL + "\n")
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    try:
        subprocess.run(
            [*argv, "--target", str(part), "-r", str(requirements)],
            check=True,
            timeout=120,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("verl's wheel: pip did not get it within 120 s")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["pip says nothing"]
        pytest.skip(f"verl's wheel cannot be had: {lines[-1]}")
    part.rename(target)
    return target


@pytest.fixture(scope="module")
def verl(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    assert pytestconfig.cache is not None
    wheel = installed(Path(pytestconfig.cache.mkdir("verl-0.9.1")))
    folder = tmp_path_factory.mktemp("verl")
    given = {
        "mask": STEP.mask,
        "logprobs": STEP.logprobs,
        "old": STEP.old,
        "rollout": STEP.rollout,
        "reference": STEP.reference,
        "advantages": STEP.advantages,
        "weights": our_weights("token", masks=False),
        "rewards": STEP.rewards,
        "group": torch.tensor(GROUPS),
        "kl": KL,
        "kl_coef": KL_COEF,
        "clips": CLIPS,
        "longest": LONGEST,
        "logits": LOGITS,
        "overlong": OVERLONG,
    }
    torch.save(given, folder / "given.pt")
    argv = [sys.executable, str(PROGRAM), str(wheel), str(folder / "given.pt"), str(folder / "found.pt")]
    done = subprocess.run(argv, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return found


def our_weights(level: Any, *, masks: bool) -> Tensor:
    gap = (STEP.old - STEP.rollout) * STEP.mask
    return limited(raw_weights(gap, level, STEP.sequences), masks=masks, floor=0.6 if masks else 0.0, cap=1.5)


def close(ours: Tensor, theirs: Tensor, bound: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def our_advantages(preset: str, *, with_kl: bool = False) -> Tensor:
    """[B, S]: the driver's advantages, then the step's."""
    kl_in = "reward" if with_kl else "loss"
    algorithm = AlgorithmSection(
        preset=preset, advantage_eps=1e-6, min_group_std=0.0, kl_in=kl_in, kl_coef=KL_COEF, kl_estimator="k1"
    )
    advantages: list[float] = []
    for group in sorted(set(GROUPS)):
        rewards = [STEP.rewards[i].item() for i in range(len(GROUPS)) if GROUPS[i] == group]
        advantages += group_advantages(
            rewards,
            eps=algorithm.advantage_eps,
            min_std=algorithm.min_group_std,
            baseline=algorithm.baseline,
            scale=algorithm.scale,
        )
    samples = [
        TrainingSample((1,), (2,) * length, (0.0,) * length, (0,) * length, advantage, reward.item(), str(group))
        for length, advantage, reward, group in zip(LENGTHS, advantages, STEP.rewards, GROUPS, strict=True)
    ]
    kl = [KL[i, :length].tolist() for i, length in enumerate(LENGTHS)] if with_kl else None
    found = torch.zeros_like(STEP.mask)
    for row, values_T in enumerate(step_advantages(samples, algorithm, kl)):
        found[row, : len(values_T)] = torch.tensor(values_T, dtype=torch.float64)
    return found


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_advantages(verl: dict[str, Any], preset: str) -> None:
    close(our_advantages(preset), verl[preset], BOUNDS.get(preset, 1e-12))


@pytest.mark.parametrize("preset", ["grpo", "reinforce_pp"])
def test_advantages_with_the_kl_in_the_reward(verl: dict[str, Any], preset: str) -> None:
    close(our_advantages(preset, with_kl=True), verl[f"{preset} with kl"], BOUNDS.get(preset, 1e-12))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("kind", list(CLIPS))
def test_losses_and_gradients(verl: dict[str, Any], kind: str, aggregation: str) -> None:
    """verl's PPO always has the dual clip; its other losses have none. Its mean over a reply divides by the length plus
    1e-8."""
    low, high = CLIPS[kind]
    algorithm = AlgorithmSection(
        policy_loss=kind,
        aggregation=aggregation,
        clip_low=low,
        clip_high=high,
        clip_dual=3.0 if kind == "ppo" else None,
        importance_cap=1.5,
    )
    logprobs = STEP.logprobs.clone().requires_grad_()
    loss = STEP.mean(STEP.loss(logprobs, algorithm, ref_logprobs=None))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    wanted = verl[f"{kind} {aggregation}"]
    bound = 1e-7 if aggregation == "sequence_mean" else 1e-12
    close(loss, wanted["loss"], bound)
    close(gradient, wanted["gradient"], bound)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators(verl: dict[str, Any], kind: Any) -> None:
    logprobs = STEP.logprobs.clone().requires_grad_()
    estimate = kl_estimate(logprobs, STEP.reference, kind)
    close(estimate.detach(), verl[kind]["values"])
    (gradient,) = torch.autograd.grad((estimate * STEP.mask).sum(), logprobs)
    close(gradient, verl[kind]["gradient"])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_entropy_bonus(verl: dict[str, Any], aggregation: str) -> None:
    """verl's trainer subtracts coefficient x this mean from its loss."""
    coef, logits = 0.01, LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)

    def loss(entropy_coef: float) -> Tensor:
        algorithm = AlgorithmSection(aggregation=aggregation, entropy_coef=entropy_coef, kl_coef=0.0)
        return STEP.mean(STEP.loss(STEP.logprobs, algorithm, entropy=entropy))

    bonus = (loss(0.0) - loss(coef)) / coef
    (gradient,) = torch.autograd.grad(bonus, logits)
    wanted = verl[f"entropy {aggregation}"]
    close(bonus.detach(), wanted["loss"], 1e-7 if aggregation == "sequence_mean" else 1e-10)
    close(gradient, wanted["gradient"], 1e-7 if aggregation == "sequence_mean" else 1e-10)


def test_overlong_shaping(verl: dict[str, Any]) -> None:
    longest, penalty = OVERLONG["longest"], OVERLONG["penalty"]
    share = OVERLONG["buffer"] / longest
    ours = [overlong_shaping(n, longest=longest, share=share, penalty=penalty) for n in OVERLONG["lengths"]]
    close(torch.tensor(ours, dtype=torch.float64), verl["overlong"], 1e-7)  # verl counts in fp32


@pytest.mark.parametrize("beyond", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(verl: dict[str, Any], level: str, beyond: str) -> None:
    close(our_weights(level, masks=beyond == "mask") * STEP.mask, verl[f"{level} {beyond}"])
