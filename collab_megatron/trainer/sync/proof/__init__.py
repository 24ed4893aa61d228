"""Proof that an engine holds the trainer's weights: checksums of every tensor, and log-probs of a probe prompt."""
