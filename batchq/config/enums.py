"""Fields that take one of a few words."""

from __future__ import annotations

from enum import Enum


class Scheme(Enum):
    auto = "auto"
    none = "none"
    fp8 = "fp8"
    fp8_gptq = "fp8_gptq"
    fp8_block = "fp8_block"
    int8 = "int8"
    int8_rtn = "int8_rtn"
    w8a16 = "w8a16"
    w4a16 = "w4a16"
    w4a16_awq = "w4a16_awq"
    w4a8_fp8 = "w4a8_fp8"
    nvfp4 = "nvfp4"
    sparse24 = "sparse24"


class InputFormat(Enum):
    auto = "auto"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"
    text = "text"
    dataset = "dataset"
    delta = "delta"
    iceberg = "iceberg"


class TableFormat(Enum):
    delta = "delta"


class Unreadable(Enum):
    stop = "stop"
    quarantine = "quarantine"


class TaskKind(Enum):
    classify = "classify"
    generate = "generate"


class EngineKind(Enum):
    vllm = "vllm"
    fake = "fake"


class KvCache(Enum):
    auto = "auto"
    fp8 = "fp8"


class LogLevel(Enum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(Enum):
    text = "text"
    json = "json"
