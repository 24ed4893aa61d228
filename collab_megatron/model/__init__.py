"""Facts about a model from its config.json: sizes, weight names, layouts, FLOPs, memory. Loads no weights."""
