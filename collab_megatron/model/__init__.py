"""What a config.json says about a model: sizes, weight names, layouts, operations, memory. Loads no weights."""
