"""All settings together."""

from typing import Annotated, Literal

import yaml
from pydantic import Field

from erasediff.config.distributed import DistributedConfig
from erasediff.config.fields import Count, Section
from erasediff.config.methods import EsdConfig, PruningConfig, SalunConfig, SelectiveAmnesiaConfig
from erasediff.config.saemnesia import SaemnesiaConfig
from erasediff.config.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    UnlearnConfig,
)
from erasediff.config.text_to_image import ImagesConfig, OutputConfig, TextToImageConfig


class Config(Section):
    """All settings.

    ``precision`` is that of the forward and backward passes; weights stay in float32. ``threads`` are those of a CPU
    (None: one per core): the digits' convolutions are too small for more than one, and sums in another number of
    threads round differently. ``images``, ``text_to_image`` and ``output`` are for text-to-image models alone.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    threads: Count | None = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()
    images: ImagesConfig = ImagesConfig()
    text_to_image: TextToImageConfig = TextToImageConfig()
    output: OutputConfig = OutputConfig()
    distributed: DistributedConfig = DistributedConfig()
    esd: EsdConfig = EsdConfig()
    pruning: PruningConfig = PruningConfig()
    salun: SalunConfig = SalunConfig()
    selective_amnesia: SelectiveAmnesiaConfig = SelectiveAmnesiaConfig()
    saemnesia: SaemnesiaConfig = SaemnesiaConfig()

    def to_yaml(self) -> str:
        """This configuration as YAML that ``load_config`` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
