"""Configuration of all commands, typed and validated: a YAML file overridden by flags."""

from erasediff.config.distributed_config import DistributedConfig, check_offload, check_shares
from erasediff.config.parsing import (
    differences,
    for_text_to_image,
    given_settings,
    load_config,
    load_config_and_section,
    parse_assignments,
    read_settings,
)
from erasediff.config.schema import Config
from erasediff.config.sections import (
    DataConfig,
    EvaluateConfig,
    ImagesConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    SampleConfig,
    TextToImageConfig,
    TrainConfig,
)
from erasediff.config.unlearn_config import UnlearnConfig

__all__ = [
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "ImagesConfig",
    "ModelConfig",
    "OutputConfig",
    "RunConfig",
    "SampleConfig",
    "TextToImageConfig",
    "TrainConfig",
    "UnlearnConfig",
    "check_offload",
    "check_shares",
    "differences",
    "for_text_to_image",
    "given_settings",
    "load_config",
    "load_config_and_section",
    "parse_assignments",
    "read_settings",
]
