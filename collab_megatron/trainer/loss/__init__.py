"""Pure tensors and numbers: advantages, policy losses, KL. No megatron, no torch.distributed."""
