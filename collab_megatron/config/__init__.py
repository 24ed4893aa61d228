"""Typed, frozen configuration. Pure: its import loads neither torch nor megatron."""

from collab_megatron.config.config_file import dump_config, kept_config, load_config, show_config
from collab_megatron.config.entry import (
    BuildDatasetConfig,
    DPOConfig,
    EvaluateConfig,
    RLConfig,
    SFTConfig,
    SupervisedConfig,
)

__all__ = [
    "BuildDatasetConfig",
    "DPOConfig",
    "EvaluateConfig",
    "RLConfig",
    "SFTConfig",
    "SupervisedConfig",
    "dump_config",
    "kept_config",
    "load_config",
    "show_config",
]
