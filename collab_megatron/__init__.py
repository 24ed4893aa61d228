"""collab_megatron: a Megatron-Core trainer for CollabLLM's multiturn-aware rewards."""

__version__ = "0.2.0"
