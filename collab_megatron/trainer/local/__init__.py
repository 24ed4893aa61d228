"""Layers and kernels for machines without transformer-engine, and what Megatron needs on one without CUDA."""
