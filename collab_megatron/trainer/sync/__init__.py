"""Weights from the trainer's shards to the engines: the one room that touches both worlds."""
