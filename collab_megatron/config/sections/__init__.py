"""The sections of a configuration: frozen, typed, every field with its meaning and unit.

A config file holds only what differs from the defaults here. Entry points combine the sections (config/entry.py).
"""

from collab_megatron.config.sections.base import UMASKS, Count, Finite, Positive, Seconds, Section, Share, Umask
from collab_megatron.config.sections.engine import EngineSection, SyncSection
from collab_megatron.config.sections.llm import (
    BudgetSection,
    DeploymentSection,
    HealthSection,
    JudgeSection,
    LLMSection,
    RewardSection,
    SimulatorSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.config.sections.rollout import (
    DriverSection,
    EvaluationSection,
    JournalSection,
    RecordSection,
    RolloutSection,
)
from collab_megatron.config.sections.training import (
    AlgorithmSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    TrainSection,
)

__all__ = [
    "UMASKS",
    "AlgorithmSection",
    "BudgetSection",
    "Count",
    "DataSection",
    "DeploymentSection",
    "DriverSection",
    "EngineSection",
    "EvaluationSection",
    "Finite",
    "HealthSection",
    "JournalSection",
    "JudgeSection",
    "LLMSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "Positive",
    "RecordSection",
    "RewardSection",
    "RolloutSection",
    "RunSection",
    "Seconds",
    "Section",
    "Share",
    "SimulatorSection",
    "SimulatorsSection",
    "SyncSection",
    "TrainSection",
    "Umask",
    "UserSection",
]
