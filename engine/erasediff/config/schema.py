"""Configuration schema: all sections, and those that methods register."""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer
from pydantic.fields import FieldInfo

from erasediff.config.distributed_config import DistributedConfig
from erasediff.config.fields import Section, Threads
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
from erasediff.config.verdict_config import VerdictConfig

SECTION_ALIASES = {"pixel_model": "model", "dataset": "data"}
"""Alternative names of sections in files and ``--set``."""

PRECISION_ALIASES = {"float32": "fp32", "bfloat16": "bf16-mixed"}
"""Earlier names of precisions. Runs still write them, so that caches and stored configurations stay valid."""

Precision = Annotated[
    Literal["fp32", "bf16-mixed", "bf16-true"],
    BeforeValidator(lambda value: PRECISION_ALIASES.get(value, value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: {new: old for old, new in PRECISION_ALIASES.items()}.get(value, value), str),
]

SectionT = TypeVar("SectionT", bound=Section)


class Config(Section):
    """Configuration of all commands.

    Each method's own settings are a further section, which ``erasediff.methods`` registers when it is imported;
    ``load_config`` sees to that. A file may call ``model`` ``pixel_model``, and ``data`` ``dataset``: see
    ``SECTION_ALIASES``.

    Attributes:
        seed: Seed of initial weights, order, noise and dropout.
        device: "auto", "cpu" or "cuda".
        threads: Threads of a CPU; None for one per core, the default of all but the digits, whose convolutions are too
            small for more than one. Sums in another number of threads round differently.
        precision: "fp32", "bf16-mixed" (autocast to bfloat16 on float32 weights) or "bf16-true" (bfloat16 weights as
            well, of text-to-image models).
        model: Model that ``train`` builds.
        data: Data set of a model without prompts.
        train: Training.
        unlearn: Unlearning.
        sample: Sampling.
        evaluate: Evaluation.
        run: Checkpoints and metrics.
        verdict: Verdict at the end of an unlearning run.
        images: Images to forget and retain.
        text_to_image: Loading of a text-to-image checkpoint and weights to train.
        output: Format of an unlearned text-to-image model.
        distributed: Parallelism.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    threads: Threads | None = 1
    precision: Precision = "fp32"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()
    verdict: VerdictConfig = VerdictConfig()
    images: ImagesConfig = ImagesConfig()
    text_to_image: TextToImageConfig = TextToImageConfig()
    output: OutputConfig = OutputConfig()
    distributed: DistributedConfig = DistributedConfig()

    def section(self, kind: type[SectionT]) -> SectionT:
        """Settings of one method, by their class: ``config.section(EsdConfig)`` is ``config.esd``, typed."""
        return next(value for value in vars(self).values() if type(value) is kind)

    def to_yaml(self, exclude: Mapping[str, set[str] | bool] | None = None) -> str:
        """Dump as YAML that ``load_config`` reads back to an equal configuration.

        ``exclude`` names keys, or whole sections by true, to be left out.
        """
        return yaml.safe_dump(self.model_dump(mode="json", exclude=dict(exclude or {})), sort_keys=False)


BASE_FIELDS = frozenset(Config.model_fields) - {"verdict"}
"""Settings and sections that do not belong to a method; without the section that earlier runs did not have."""


def register_sections(sections: Mapping[str, type[Section]]) -> None:
    """Add sections to ``Config``, by their keys: the settings of the methods."""
    for name, section in sections.items():
        Config.model_fields[name] = FieldInfo.from_annotated_attribute(section, section())
    Config.model_rebuild(force=True)
