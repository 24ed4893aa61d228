"""Training checkpoints in Megatron's distributed format: save, load, resume, convert to and from Hugging Face."""
