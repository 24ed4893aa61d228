"""Losses as functions of tensors: policy gradient, KL, negative log-likelihood. No megatron, no torch.distributed."""
