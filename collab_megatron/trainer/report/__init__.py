"""Reports of a run: phase timers, dashboard (TensorBoard and metrics.jsonl), progress line, alarms, tables."""
