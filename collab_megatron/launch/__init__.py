"""Processes on this node: placement, launch, supervision, and the checks before anything is started."""
