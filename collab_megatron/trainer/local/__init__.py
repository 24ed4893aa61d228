"""Layers and kernels for machines without transformer-engine, and patches for Megatron on machines without CUDA."""
