"""Registers the benchmark's reward: the module that reward.metric_modules names in tools/bench/grpo_step.py."""

from tools.bench.grpo_step_reward import register

register()
