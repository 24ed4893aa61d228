"""The policy on Megatron-Core: rank grid, device choice, model, log-probs, optimizer step, frozen reference.

Importing this package makes megatron importable on a machine without CUDA (cpu_support.py); it has no effect where CUDA
is there. It must run before any megatron module, hence here.
"""

import warnings

from collab_megatron.trainer.local.cpu_support import install

# a page of warnings per rank about optional packages; backend.py logs in one line what was chosen
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
# and about torch interfaces that megatron 0.16 still uses
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch\.distributed)\.")

install()
