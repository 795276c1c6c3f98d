"""Configuration of all commands, typed and validated: a YAML file overridden by flags."""

from erasediff.config.checks import check_offload, check_shares
from erasediff.config.parsing import differences, for_text_to_image, given_settings, load_config, parse_assignments
from erasediff.config.schema import (
    Config,
    DataConfig,
    DistributedConfig,
    EvaluateConfig,
    ImagesConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    SampleConfig,
    TextToImageConfig,
    TrainConfig,
    UnlearnConfig,
)

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
    "parse_assignments",
]
