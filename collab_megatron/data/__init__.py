"""Rows, splits, order and chat templates: everything between a dataset and token ids."""
