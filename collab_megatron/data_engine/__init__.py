"""The data engine: multi-turn conversations grown from single-turn problems (tools/build_dataset.py).

The one part of data/ that talks to simulators and metrics.
"""
