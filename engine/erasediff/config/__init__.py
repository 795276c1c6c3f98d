"""Every setting of every command, typed and validated: a YAML file overridden by flags."""

from erasediff.config.defaults import for_text_to_image
from erasediff.config.distributed import DistributedConfig, check_offload, check_shares
from erasediff.config.reading import differences, load_config, parse_assignments
from erasediff.config.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    UnlearnConfig,
)
from erasediff.config.settings import Config
from erasediff.config.text_to_image import ImagesConfig, OutputConfig, TextToImageConfig

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
    "load_config",
    "parse_assignments",
]
