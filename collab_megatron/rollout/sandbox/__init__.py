"""Sandbox for programs that a model wrote: namespaces, limits, and a runner of unit tests inside."""
