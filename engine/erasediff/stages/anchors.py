"""What is drawn in the place of a forgotten concept, where nobody has said it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from torch import Tensor

from erasediff.config import Config
from erasediff.data import CachedBatches, CachedImages
from erasediff.data.cached_batches import stacked
from erasediff.data.latents import NULL_CAPTION
from erasediff.distributed import Peers
from erasediff.methods import RECIPES
from erasediff.models.family import TextToImageModel
from erasediff.objectives.anchor import condition_losses
from erasediff.runs.loop import Batches

CANDIDATES, FINALISTS = 64, 8
IMAGES, DRAWS = 16, 8
"""A final looks at each image under that many noises; the round before it, at one."""


def anchored(config: Config, model: TextToImageModel, retain: Batches, forget: Batches, console: Console) -> Config:
    """``config`` with anchor prompts, where its method relabels and nobody has named any.

    The anchor is the retained caption under which the model denoises the forgotten images best: what it takes them for
    if it may not call them by their own name. A rehearsal, which has no captions, takes the empty one.
    """
    if config.text_to_image.anchor_prompts or not RECIPES[config.unlearn.method].needs(config).relabel:
        return config
    prompt = NULL_CAPTION
    if isinstance(retain, CachedBatches) and isinstance(forget, CachedBatches):
        peers = Peers.current()
        # The main rank alone where the denoiser is still on the disk: no other need hold all of it.
        looks = peers.is_main or not model.denoiser_is_empty
        found = nearest_caption(model, retain.images, forget.images, seed=config.seed) if looks else None
        prompt = peers.from_main(found)
        console.print(f'Anchor: "{prompt}"; another can be given with --anchor-prompts.', markup=False, highlight=False)
    chosen = config.text_to_image.model_copy(update={"anchor_prompts": (prompt,)})
    return config.model_copy(update={"text_to_image": chosen})


def nearest_caption(model: TextToImageModel, retain: CachedImages, forget: CachedImages, *, seed: int) -> str:
    """The caption of ``retain`` that explains the images of ``forget`` best: see ``condition_losses``.

    Among at most ``CANDIDATES`` different captions, the most frequent first or, where they are all alike, some of all
    parts of the set.
    """
    keys = {entry.text: entry.caption for entry in retain.entries}
    captions = _candidates([entry.text for entry in retain.entries])
    batch = _some(model, forget)
    denoiser = model.whole_denoiser()
    for count, draws in ((FINALISTS, 1), (1, DRAWS)):
        conditions = stacked([retain.captions.row(keys[caption]) for caption in captions], model.device)
        losses = condition_losses(
            denoiser,
            batch,
            conditions,
            process=model.process,
            denoiser=model.denoiser,
            draws=draws,
            seed=seed,
        )
        best = losses.argsort(stable=True)[:count].tolist()
        captions = [captions[number] for number in best]
    return captions[0]


def _candidates(captions: Sequence[str]) -> list[str]:
    """Distinct and not empty, by frequency; evenly spaced among those as frequent as the last that has room."""
    counted = Counter(caption for caption in captions if caption != NULL_CAPTION)
    ordered = [caption for caption, _ in counted.most_common()]
    if len(ordered) <= CANDIDATES:
        return ordered or [NULL_CAPTION]
    least = counted[ordered[CANDIDATES - 1]]
    above = [caption for caption in ordered if counted[caption] > least]
    alike = [caption for caption in ordered if counted[caption] == least]
    room = CANDIDATES - len(above)
    return above + [alike[number * len(alike) // room] for number in range(room)]


def _some(model: TextToImageModel, images: CachedImages) -> dict[str, Tensor]:
    """A batch of at most ``IMAGES`` images of the commonest size, from all parts of the set."""
    size, _ = Counter(entry.size for entry in images.entries).most_common(1)[0]
    entries = [entry for entry in images.entries if entry.size == size]
    count = min(IMAGES, len(entries))
    chosen = [entries[number * len(entries) // count] for number in range(count)]
    return stacked([images.row(entry) for entry in chosen], model.device)
