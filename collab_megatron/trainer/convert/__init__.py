"""Hugging Face folders to Megatron shards and back: name tables, pure reshapes, lazy loader, streaming exporter.

Nothing in this room imports megatron, so the launcher can check a layout before it starts a process.
"""
