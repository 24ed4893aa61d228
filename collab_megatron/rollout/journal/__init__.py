"""The journal: policy turns, LLM replies and batches on disk before they are used."""
