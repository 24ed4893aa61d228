"""What SGLang lacks on a machine without a GPU; README.md beside the distribution says why each piece exists."""
