"""The demo: a small world, rule-based users, judges and assistants, an endpoint that serves them, and a tiny model."""
