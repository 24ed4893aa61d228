"""The parts that SGLang lacks on a machine without a GPU. The distribution's README.md has the reason for each."""
