"""The launcher: checks before the start, the plan, and the processes of a run on this node."""
