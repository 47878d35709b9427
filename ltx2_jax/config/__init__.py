"""The configuration of a run: frozen dataclasses, a file that fills them, flags that change them.

A config file is Python with a function `get_config(arg: str | None) -> Config`. On the command line

    --config=configs/quickstart.py:ARG --config.optim.learning_rate=3e-4 --config.mesh.model=2

calls it with ARG and then replaces fields. A wrong name or type is an error that lists what is
right. One config object goes down through the program, and into every checkpoint.
"""

from ltx2_jax.config.films import FilmsConfig
from ltx2_jax.config.loading import changed, load, overrides
from ltx2_jax.config.run import (
    CONDITIONS,
    OPTIMIZERS,
    ROLES,
    SCHEDULES,
    SIGMAS,
    SYNC_LAG,
    CheckConfig,
    CheckpointConfig,
    Condition,
    Config,
    DataConfig,
    FlowConfig,
    LoraConfig,
    MeshConfig,
    MetricsConfig,
    OptimConfig,
    ProfileConfig,
    SampleConfig,
    StreamConfig,
    TextConfig,
    TuneConfig,
    ValidationConfig,
    WatchdogConfig,
)

__all__ = [
    "CONDITIONS",
    "OPTIMIZERS",
    "ROLES",
    "SCHEDULES",
    "SIGMAS",
    "SYNC_LAG",
    "CheckConfig",
    "CheckpointConfig",
    "Condition",
    "Config",
    "DataConfig",
    "FilmsConfig",
    "FlowConfig",
    "LoraConfig",
    "MeshConfig",
    "MetricsConfig",
    "OptimConfig",
    "ProfileConfig",
    "SampleConfig",
    "StreamConfig",
    "TextConfig",
    "TuneConfig",
    "ValidationConfig",
    "WatchdogConfig",
    "changed",
    "load",
    "overrides",
]
