"""Load models: models in pixels, text-to-image checkpoints with a LoRA, pruning masks."""

from pathlib import Path

import torch
from rich.console import Console

from erasediff.config import Config, differences, for_text_to_image
from erasediff.data import ClassDataset
from erasediff.errors import UserError
from erasediff.io.atomic import check_new
from erasediff.models import PixelModel, lora
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint.base import WEIGHT_FILES
from erasediff.models.checkpoint.hub import is_hub_id
from erasediff.models.diffusion_model import UnpromptedModel
from erasediff.models.load import load_text_to_image
from erasediff.models.pixel_unet import is_pixel_model
from erasediff.models.weight_masks import apply_masks, load_masks
from erasediff.training.job import set_up_device, thread_scope


def load_model(path: Path, dataset: ClassDataset, device: torch.device) -> PixelModel:
    """Load the pixel-space model in ``path``. UserError if it cannot be read or is one of other images."""
    model = PixelModel.load(path, device)
    check_fits(model, dataset, path)
    return model


def check_fits(model: UnpromptedModel, dataset: ClassDataset, source: object) -> None:
    """Raise UserError for a model, read from ``source``, that cannot have been trained on ``dataset``."""
    image_shape = tuple(dataset.train.sample.shape[1:])
    if model.image_shape != image_shape or model.num_classes not in (None, dataset.num_classes):
        raise UserError(
            f"The model in {source} makes {_described(model.image_shape, model.num_classes)}, "
            f"but the data are {_described(image_shape, dataset.num_classes)}: name its own data with --data."
        )


def load_unprompted(path: Path, device: torch.device, console: Console) -> PixelModel:
    """Load a model without prompts, class-conditional or not; what had to be assumed of it is printed.

    Raises:
        UserError: As ``PixelModel.load``.
    """
    model = PixelModel.load(path, device)
    if model.is_schedule_assumed:
        console.print(
            f"{path} has no scheduler: the linear schedule of DDPM, 1000 timesteps and epsilon prediction are assumed. "
            "A scheduler_config.json beside its config.json says otherwise.",
            markup=False,
            highlight=False,
        )
    return model


def load_checkpoint(config: Config, source: Path, device: torch.device, *, empty: bool = False) -> LatentModel:
    """Load the text-to-image model in ``source``, and merge the LoRA of ``config`` into it if there is one.

    Args:
        config: Configuration; its section ``text_to_image`` applies.
        source: See ``load_text_to_image``.
        device: Device of the weights.
        empty: Leave the denoiser on the meta device; ``read_denoiser`` reads its weights, and merges the LoRA.

    Raises:
        UserError: For a checkpoint or a LoRA that is missing, damaged, or not for the other.
    """
    settings = config.text_to_image
    model = load_text_to_image(
        source,
        dtype=getattr(torch, settings.weights),
        device=device,
        config=settings.config,
        prediction_type=settings.prediction_type,
        empty=empty,
    )
    if settings.lora is not None and empty:
        # All its errors are seen before anything is encoded; the empty denoiser stays as it is.
        lora.merge_into_encoders(model, settings.lora)
    elif settings.lora is not None:
        lora.merge_file(model, settings.lora)
    return model


def read_denoiser(config: Config, model: LatentModel) -> None:
    """Give a model that was opened ``empty`` its denoiser's weights, with the LoRA of ``config`` merged into them."""
    model.denoiser = model.materialize_denoiser()
    if config.text_to_image.lora is not None:
        lora.merge_into_denoiser(model, config.text_to_image.lora)


def _described(image_shape: tuple[int, ...], num_classes: int | None) -> str:
    """Images of a shape and number of classes in words."""
    classes = "" if num_classes is None else f" in {num_classes} classes"
    return f"images of {' x '.join(map(str, image_shape))}{classes}"


SECTIONS = ("text_to_image.", "output.", "images.images_per_prompt")
"""Settings of text-to-image models alone, but for ``ANY_MODEL``."""
ANY_MODEL = frozenset({"text_to_image.train", "text_to_image.gradient_checkpointing"})


def is_text_to_image(source: Path) -> bool:
    """Return true if ``source`` is a weight file, a folder of no pixel-space model, or a hub id."""
    if source.suffix in WEIGHT_FILES:
        return True
    if source.is_dir():
        return not is_pixel_model(source)
    return not source.exists() and is_hub_id(str(source))


def refuse_text_to_image_settings(config: Config) -> None:
    """Raise UserError for settings of text-to-image models, given for a pixel-space model."""
    changed = differences(Config(), config)
    foreign = [name for name in changed if name.startswith(SECTIONS) and name not in ANY_MODEL]
    if foreign:
        raise UserError(f"The setting {foreign[0]} is for text-to-image models, which {config.unlearn.model} is not.")


def check_pixel_precision(config: Config) -> None:
    """Raise UserError for a precision that pixel-space models are not trained in."""
    if config.precision == "bf16-true":
        raise UserError("Pixel-space models keep float32 weights: set precision to bf16-mixed or fp32.")


@thread_scope()
def mask_model(config: Config, source: Path, mask: Path, out: Path, restore_from: Path | None) -> None:
    """Write ``source`` to ``out`` as a diffusers folder, pruned, or with the weights of ``restore_from`` put back.

    UserError for files that cannot be read, masks of another model, and an ``out`` that exists.
    """
    check_new(out)
    config = for_text_to_image(config)
    device = set_up_device(config)
    masks = load_masks(mask)
    model = load_checkpoint(config, source, device)
    original = None if restore_from is None else load_checkpoint(config, restore_from, device).denoiser
    apply_masks(model.denoiser, masks, original)
    model.save(out)
