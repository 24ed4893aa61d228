"""From a dataset to token ids: rows, splits, row order, chat templates."""
