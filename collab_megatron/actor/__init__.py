"""The policy on Megatron-Core: rank grid, device choice, model, log-probs, optimizer step, frozen reference.

Importing this package makes megatron importable on a machine without CUDA (cpu_support.py); it has no effect where CUDA
is there. It must run before any megatron module, hence here.
"""

from collab_megatron.actor.cpu_support import install

install()
