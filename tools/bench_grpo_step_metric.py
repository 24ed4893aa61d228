"""Registers the benchmark's reward: the module that reward.metric_modules names in tools/bench_grpo_step.py."""

from tools.bench_grpo_step_reward import register

register()
