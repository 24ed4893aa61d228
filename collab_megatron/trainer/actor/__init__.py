"""The policy on Megatron-Core: rank grid, agreement between ranks, model, log-probs, optimizer step, frozen reference.

Importing this package silences megatron's warnings and, on a machine without CUDA, patches torch.cuda so that megatron
can be imported at all (local/cpu_support.py). Both must happen before any megatron module is imported, hence here.
"""

import warnings

from collab_megatron.trainer.local.cpu_support import install

# a page of warnings per rank about optional packages; backend.py logs the choice in one line
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
# and about torch interfaces that megatron still uses
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch\.distributed)\.")

install()
