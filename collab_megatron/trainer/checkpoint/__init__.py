"""Training state on disk: Megatron's distributed checkpoints, written aside, marked complete, kept few."""
