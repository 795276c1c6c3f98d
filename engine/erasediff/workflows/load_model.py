"""Load models: without prompts or text-to-image, with a LoRA; pruning masks."""

from pathlib import Path

import torch
from rich.console import Console

from erasediff.config import Config, differences, for_text_to_image
from erasediff.data import ClassDataset
from erasediff.errors import UserError
from erasediff.io.atomic import check_new
from erasediff.models import PixelModel, load, lora
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint.base import WEIGHT_FILES, read_json
from erasediff.models.checkpoint.diffusers_folder import INDEX
from erasediff.models.checkpoint.hub import is_hub_id
from erasediff.models.checkpoint.network_folder import is_network_alone
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.models.diffusion_model import UnpromptedModel
from erasediff.models.family import known_family
from erasediff.models.load import load_text_to_image
from erasediff.models.unprompted_latents import UnpromptedLatentModel
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


def load_unprompted(
    path: Path, device: torch.device, console: Console, *, lora_file: Path | None = None, empty: bool = False
) -> PixelModel | UnpromptedLatentModel:
    """Load a model without prompts; what had to be assumed of it is printed.

    Args:
        path: See ``load_diffusion_model``.
        device: Device of the weights.
        console: Console for notes.
        lora_file: A LoRA to merge into the denoiser.
        empty: Leave the denoiser on the meta device; ``read_denoiser`` reads its weights, and merges the LoRA.

    Raises:
        UserError: As ``load_diffusion_model``, and for a LoRA that is not for the model.
    """
    model = load.load_unprompted(path, device, empty=empty)
    if isinstance(model, PixelModel) and model.is_schedule_assumed:
        console.print(
            f"{path} has no scheduler: the linear schedule of DDPM, 1000 timesteps and epsilon prediction are assumed. "
            "A scheduler_config.json beside its config.json says otherwise.",
            markup=False,
            highlight=False,
        )
    if lora_file is not None and empty:
        # All its errors are seen before anything is encoded.
        lora.merge_into_encoders(model, lora_file)
    elif lora_file is not None:
        lora.merge_file(model, lora_file)
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


def read_denoiser(config: Config, model: CheckpointModel) -> None:
    """Give a model that was opened ``empty`` its denoiser's weights, with the LoRA of ``config`` merged into them."""
    model.denoiser = model.materialize_denoiser()
    if config.text_to_image.lora is not None:
        lora.merge_into_denoiser(model, config.text_to_image.lora)


def _described(image_shape: tuple[int, ...], num_classes: int | None) -> str:
    """Images of a shape and number of classes in words."""
    classes = "" if num_classes is None else f" in {num_classes} classes"
    return f"images of {' x '.join(map(str, image_shape))}{classes}"


SECTIONS = ("text_to_image.", "images.images_per_prompt", "images.rehearsal_share")
"""Settings of text-to-image models alone, but for ``ANY_MODEL``."""
ANY_MODEL = frozenset(
    f"text_to_image.{name}"
    for name in ("lora", "train", "lora_rank", "lora_alpha", "lora_targets", "gradient_checkpointing")
)


def is_text_to_image(source: Path) -> bool:
    """Return true if ``source`` is a model with prompts, or none that is known here.

    Raises:
        UserError: It is a hub id, and the repository cannot be downloaded.
    """
    if source.suffix in WEIGHT_FILES or is_network_alone(source):
        return source.suffix in WEIGHT_FILES
    if source.is_dir():
        pipeline = _pipeline_name(source / INDEX)
    elif not source.exists() and is_hub_id(str(source)):
        pipeline = open_checkpoint(source).index.get("_class_name")
    else:
        return False
    family = known_family(pipeline)
    return family is None or issubclass(family, LatentModel)


def _pipeline_name(index: Path) -> str | None:
    """The pipeline that a model_index.json names; None where it cannot be read, which loading will tell."""
    try:
        name = read_json(index).get("_class_name")
    except UserError:
        return None
    return name if isinstance(name, str) else None


def refuse_text_to_image_settings(config: Config) -> None:
    """Raise UserError for settings of text-to-image models, given for a model without prompts."""
    changed = differences(Config(), config)
    foreign = [name for name in changed if name.startswith(SECTIONS) and name not in ANY_MODEL]
    if foreign:
        raise UserError(f"The setting {foreign[0]} is for text-to-image models, which {config.unlearn.model} is not.")


def check_pixel_precision(config: Config) -> None:
    """Raise UserError for a precision that models without prompts are not trained in."""
    if config.precision == "bf16-true":
        raise UserError("Models without prompts keep float32 weights: set precision to bf16-mixed or fp32.")


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
