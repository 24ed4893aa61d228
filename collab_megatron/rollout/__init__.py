"""Grows conversation trees: policy replies, simulated users, judges, rewards, advantages. Never imports megatron."""
