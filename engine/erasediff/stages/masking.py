"""Apply a pruning's mask to a checkpoint, or undo it."""

from pathlib import Path

from erasediff.config import Config, for_text_to_image
from erasediff.models.masks import apply_masks, load_masks
from erasediff.runs.atomic import check_new
from erasediff.stages.loading import load_checkpoint
from erasediff.stages.session import set_up_device


def mask_model(config: Config, source: Path, mask: Path, out: Path, restore_from: Path | None) -> None:
    """Write ``source`` to ``out`` as a diffusers folder, pruned, or with the weights of ``restore_from`` put back.

    UserError for files that cannot be read, masks of another model, and an ``out`` that exists.
    """
    check_new(out)
    config = for_text_to_image(config)
    device = set_up_device(config)
    masks = load_masks(mask)
    model = load_checkpoint(config, source, device)
    original = None if restore_from is None else load_checkpoint(config, restore_from, device).denoiser_module
    apply_masks(model.denoiser_module, masks, original)
    model.save(out)
