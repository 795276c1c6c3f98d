"""DiT: class-conditional diffusion transformer on latents (Peebles & Xie 2023)."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Self

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, LabelEmbedding
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.models.checkpoint_model import model_dtype
from erasediff.models.diffusion_model import Condition, mean_prediction
from erasediff.models.family import Subsets
from erasediff.models.unprompted_latents import UnpromptedLatentModel


class DiT(UnpromptedLatentModel):
    """Transformer that is told a class label, with an autoencoder.

    It has ``num_embeds_ada_norm`` classes and one label more, the last, which is no class: the null label of
    classifier-free guidance. Where it predicts twice the channels of a latent, the first half is the prediction and
    the second a learned variance: the first alone is trained. ``id2label`` in model_index.json names the classes.

    Labels of batches number the classes of the data set that the model was ``described_by``, which may be a few of the
    model's own.
    """

    family = "dit"
    denoiser_component = "transformer"
    denoiser_class = DiTTransformer2DModel
    pipeline_class = DiTPipeline
    flow = False
    default_guidance = 4.0
    subsets = Subsets(
        cross_attention=frozenset(),
        self_attention=frozenset({"attn1"}),
        keys_and_values=frozenset({"to_k", "to_v"}),
        outermost=("pos_embed.", "proj_out_1.", "proj_out_2."),
        embeddings=frozenset({"emb"}),
    )
    _labels: Tensor | None = None
    """int64 [classes of the data + 1]: the model's own label of each, and its null label."""
    _names: tuple[str, ...] | None = None

    @classmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        return {
            "hidden_states": torch.zeros(batch_size, config.in_channels, *latent_size, dtype=dtype, device=device),
            "class_labels": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        transformer, vae = self.configs["transformer"], self.configs["vae"]
        yield "the transformer's in_channels", transformer.in_channels, "the VAE's latent_channels", vae.latent_channels

    def _check_components(self) -> None:
        super()._check_components()
        config = self._denoiser_config
        if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
            raise UserError(
                f"The transformer in {self.checkpoint.path} predicts {config.out_channels} channels of "
                f"{config.in_channels}-channel latents: give one that predicts as many, or twice as many with a "
                "learned variance."
            )

    def _set_up(self, denoiser: nn.Module) -> nn.Module:
        # What FSDP gathers at once: the first block's embedding is also called from outside the block.
        unit: Any = denoiser
        unit._no_split_modules = [BasicTransformerBlock.__name__, CombinedTimestepLabelEmbeddings.__name__]
        # In training mode it would drop labels by torch's global random state; ours are dropped by address.
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        return denoiser

    @property
    def condition(self) -> Condition:
        return "class"

    @property
    def _own_count(self) -> int:
        count: int = self._denoiser_config.num_embeds_ada_norm
        return count

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class; where names of the model's own are alike, with its number."""
        return self._own_names if self._names is None else self._names

    @cached_property
    def _own_names(self) -> tuple[str, ...]:
        first = [spellings[0] if spellings else str(number) for number, spellings in enumerate(self._spellings)]
        return tuple(f"{name} {number}" if first.count(name) > 1 else name for number, name in enumerate(first))

    @cached_property
    def _spellings(self) -> list[list[str]]:
        """The names of each of the model's own classes, which ``id2label`` separates by commas."""
        recorded = self.checkpoint.index.get("id2label")
        recorded = recorded if isinstance(recorded, Mapping) else {}
        found = (str(recorded.get(str(number), "")).split(",") for number in range(self._own_count))
        return [[name.strip() for name in names if name.strip()] for names in found]

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        labels = condition["class_labels"]
        if self._labels is not None:
            labels = self._labels.to(labels.device)[labels]
        sample = noisy_sample.to(model_dtype(model))
        prediction = model(sample, timestep=timesteps, class_labels=labels, return_dict=False)[0]
        return mean_prediction(prediction, noisy_sample)

    def described_by(self, class_names: tuple[str, ...]) -> Self:
        """This model with the classes of a data set alone, found among its own by name, or by number.

        As many classes as the model's, none of which has a name of its own, are taken in their order. The weights are
        shared.

        Raises:
            UserError: The data set has a class that the model does not have.
        """
        numbers = [self._number(name) for name in class_names]
        if None in numbers and len(class_names) == self._own_count and not any(n is not None for n in numbers):
            numbers = list(range(self._own_count))
        for name, number in zip(class_names, numbers, strict=True):
            if number is None:
                raise UserError(
                    f"The model has {self._own_count} classes, none of which is called {name}, as one of the data: "
                    "call the data's classes as id2label in its model_index.json does, or by number."
                )
        described = copy.copy(self)
        described._names = class_names
        described._labels = torch.tensor([*numbers, self._own_count], device=self.device)
        return described

    def _number(self, name: str) -> int | None:
        """The one of the model's own classes that is called ``name``; None for none.

        Raises:
            UserError: Several are.
        """
        numbers = self._numbers.get(name.casefold(), [])
        if len(numbers) > 1:
            listed = ", ".join(map(str, numbers))
            raise UserError(f"The model has several classes called {name}: call the data's by its number, {listed}.")
        if numbers:
            return numbers[0]
        is_number = name.isascii() and name.isdecimal() and int(name) < self._own_count
        return int(name) if is_number else None

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """Numbers of the classes by each of their names, in lower case."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, spellings in enumerate(self._spellings):
            for name in {*(spelling.casefold() for spelling in spellings), self._own_names[number].casefold()}:
                numbers[name].append(number)
        return numbers
