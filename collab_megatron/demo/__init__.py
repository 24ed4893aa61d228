"""The demo: desk tasks, rule-based user, judge and assistant behind an HTTP endpoint, a tiny model, the pipeline."""
