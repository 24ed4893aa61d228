"""What the commands and processes of a run import, once for all that are forked from the process that imports this
(tests/warm.py); not the entry points, which each process runs as its __main__."""

from __future__ import annotations

import importlib

MODULES = (
    "tests.rollout.preload",  # of drivers and evaluations, with LiteLLM
    "datasets",
    "safetensors.torch",
    "torch.utils.tensorboard",
    *(
        f"collab_megatron.{name}"
        for name in (
            "launch.conversion",
            "launch.end_report",
            "launch.epochs",
            "launch.lock",
            "launch.preflight",
            "launch.run_processes",
            "launch.supervised",
            "rollout.evaluation",
            "rollout.judged_pairs",
            "trainer.actor.actor",
            "trainer.actor.reference",
            "trainer.checkpoint.from_hf",
            "trainer.checkpoint.manager",
            "trainer.checkpoint.to_hf",
            "trainer.engine_probe",
            "trainer.engines",
            "trainer.evaluation_schedule",
            "trainer.online_dpo",
            "trainer.rl_reporter",
            "trainer.rl_step",
            "trainer.rollout_client",
            "trainer.saving",
            "trainer.step_profiler",
            "trainer.supervised.dpo",
            "trainer.supervised.loop",
            "trainer.supervised.sft",
            "trainer.sync.publisher",
        )
    ),
)
for _name in MODULES:
    importlib.import_module(_name)
