"""The configuration: what a job may say, composed by Hydra, typed and checked once, before anything starts.

schema.py holds the fields, check.py what else has to hold, folders.py where the groups are, compose.py Hydra (its only
importer, and the only place that sees a DictConfig).
"""

from batchq.config.check import MAX_LABELS, TRUST, check, check_pricing
from batchq.config.csv import CsvConfig, character
from batchq.config.deadline import deadline_after, is_clock
from batchq.config.enums import (
    EngineKind,
    InputFormat,
    KvCache,
    LogFormat,
    LogLevel,
    Scheme,
    TableFormat,
    TaskKind,
    Unreadable,
)
from batchq.config.events import WEBHOOK, EventsConfig, webhook_of
from batchq.config.fields import MISSING
from batchq.config.folders import choices, conf_dir, user_conf_dir
from batchq.config.log import LogConfig
from batchq.config.metrics import PUSHGATEWAY, MetricsConfig, pushgateway_of
from batchq.config.run import RunConfig
from batchq.config.schema import (
    IGNORE,
    CleanConfig,
    ClusterConfig,
    Config,
    EngineConfig,
    GateConfig,
    InputConfig,
    JobConfig,
    ModelConfig,
    OutputConfig,
    PricingConfig,
    QuantizationConfig,
    TaskConfig,
    TuneConfig,
)

__all__ = [
    "IGNORE",
    "MAX_LABELS",
    "MISSING",
    "PUSHGATEWAY",
    "TRUST",
    "WEBHOOK",
    "CleanConfig",
    "ClusterConfig",
    "Config",
    "CsvConfig",
    "EngineConfig",
    "EngineKind",
    "EventsConfig",
    "GateConfig",
    "InputConfig",
    "InputFormat",
    "JobConfig",
    "KvCache",
    "LogConfig",
    "LogFormat",
    "LogLevel",
    "MetricsConfig",
    "ModelConfig",
    "OutputConfig",
    "PricingConfig",
    "QuantizationConfig",
    "RunConfig",
    "Scheme",
    "TableFormat",
    "TaskConfig",
    "TaskKind",
    "TuneConfig",
    "Unreadable",
    "character",
    "check",
    "check_pricing",
    "choices",
    "conf_dir",
    "deadline_after",
    "is_clock",
    "pushgateway_of",
    "user_conf_dir",
    "webhook_of",
]
