"""The sections of a config: frozen, typed, every field with its meaning and unit in a comment (docs/config.md).

A config file contains only values that differ from these defaults. Entry points combine sections (config/entry.py).
"""

from collab_megatron.config.sections.base import (
    UMASKS,
    Count,
    Finite,
    FolderOrHubName,
    Named,
    Positive,
    Seconds,
    Section,
    Seed,
    Share,
    Umask,
)
from collab_megatron.config.sections.engine import EngineSection, SyncSection
from collab_megatron.config.sections.evaluation import (
    ApiModelSection,
    ComparedModelSection,
    ComparisonSection,
    EvaluationSection,
    ModelName,
)
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
from collab_megatron.config.sections.problems import ColumnTemplate, MappingSection
from collab_megatron.config.sections.profile import ProfileSection
from collab_megatron.config.sections.replay import ReplaySection
from collab_megatron.config.sections.rollout import (
    DriverSection,
    JournalSection,
    RecordSection,
    RolloutSection,
)
from collab_megatron.config.sections.training import (
    AlgorithmSection,
    DataSection,
    DPOSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    PreferenceSection,
    RunSection,
    TrainSection,
)

__all__ = [
    "UMASKS",
    "AlgorithmSection",
    "ApiModelSection",
    "BudgetSection",
    "ColumnTemplate",
    "ComparedModelSection",
    "ComparisonSection",
    "Count",
    "DPOSection",
    "DataSection",
    "DeploymentSection",
    "DriverSection",
    "EngineSection",
    "EvaluationSection",
    "Finite",
    "FolderOrHubName",
    "HealthSection",
    "JournalSection",
    "JudgeSection",
    "LLMSection",
    "MappingSection",
    "ModelName",
    "ModelSection",
    "Named",
    "OptimizerSection",
    "ParallelSection",
    "Positive",
    "PreferenceSection",
    "ProfileSection",
    "RecordSection",
    "ReplaySection",
    "RewardSection",
    "RolloutSection",
    "RunSection",
    "Seconds",
    "Section",
    "Seed",
    "Share",
    "SimulatorSection",
    "SimulatorsSection",
    "SyncSection",
    "TrainSection",
    "Umask",
    "UserSection",
]
