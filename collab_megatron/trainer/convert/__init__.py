"""Hugging Face folders to Megatron shards and back: reshapes, lazy loader, streaming exporter. Imports no megatron."""
