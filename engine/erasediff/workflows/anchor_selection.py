"""Anchor selection: the caption that stands for a forgotten concept, by a diffusion classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

from erasediff.config import Config
from erasediff.data import CachedBatches, CachedImages
from erasediff.data.batches import stacked
from erasediff.data.image_lists import ImageLists
from erasediff.data.latent_cache import NULL_CAPTION
from erasediff.diffusion.batch import Batch, Denoiser, condition_of, diffusers_denoiser, with_sample_ids
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.methods import METHOD_SPECS
from erasediff.models.base import LatentModel
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.loop import Batches
from erasediff_kernels import add_noise, denoising_loss

Encode = Callable[[tuple[str, ...]], dict[str, Tensor]]
"""The condition tensors [N, ...] of N prompts."""


@torch.no_grad()
def condition_losses(
    model: nn.Module,
    batch: Batch,
    conditions: Mapping[str, Tensor],
    *,
    process: Process,
    denoiser: Denoiser = diffusers_denoiser,
    draws: int = 4,
    seed: int = 0,
) -> Tensor:
    """Mean denoising loss of ``batch`` under each of n conditions instead of its own.

    The least of them is the answer of a diffusion classifier (Li et al. 2023, arXiv 2303.16203, eq. 4-5). All
    conditions see the same noisy images, so that losses differ by the condition alone; timesteps are evenly spread.

    Args:
        model: The network.
        batch: ``"sample"`` [B, C, h, w] and its condition.
        conditions: For each entry of the batch's condition that is replaced, a tensor [n, ...].
        process: Noise schedule and prediction type.
        denoiser: How the network is called.
        draws: Timesteps and noises per image.
        seed: Seed of the noises.

    Returns:
        float32 [n].

    Raises:
        ValueError: For fewer than one draw, conditions of unequal lengths, and a batch as in ``with_sample_ids``.
    """
    lengths = {len(tensor) for tensor in conditions.values()}
    if draws < 1 or len(lengths) != 1:
        raise ValueError(f"needs at least one draw and conditions of one length, got {draws} draws and {lengths}")
    batch = with_sample_ids(batch)
    sample, ids = batch["sample"], batch["sample_ids"]
    process, condition, role = process.to(sample.device), condition_of(batch), int(NoiseRole.ANCHOR)
    count, rows = len(sample), torch.arange(len(sample), device=sample.device)
    weight = torch.full((count,), 1 / (count * draws), device=sample.device)
    totals = torch.zeros(lengths.pop(), device=sample.device)
    for draw in range(draws):
        key = noise_key(seed, draw, sample.device)
        timesteps = (rows * draws + draw) * process.num_train_timesteps // (count * draws)
        alpha, sigma = process.coefficients(timesteps)
        noisy_sample = add_noise(sample, alpha, sigma, sample_ids=ids, key=key, role=role)
        for number in range(len(totals)):
            replaced = {
                name: tensor[number].to(sample.device).expand(count, *tensor.shape[1:])
                for name, tensor in conditions.items()
            }
            prediction = denoiser(model, noisy_sample, process.conditioning[timesteps], {**condition, **replaced})
            totals[number] += denoising_loss(
                prediction.to(sample.dtype),
                sample,
                alpha,
                sigma,
                prediction_type=process.prediction_type,
                weight=weight,
                sample_ids=ids,
                key=key,
                role=role,
            ).loss
    return totals


CANDIDATES, FINALISTS = 64, 8
IMAGES, DRAWS = 16, 8
"""The round among the finalists takes ``DRAWS`` noises per image; the round before it, one."""


def needs_anchor(config: Config) -> bool:
    """Return true if the method relabels and no anchor prompts are given."""
    relabels = METHOD_SPECS[config.unlearn.method].needs(config).relabel
    return relabels and not config.text_to_image.anchor_prompts


def anchor_candidates(lists: ImageLists | None) -> list[str]:
    """Captions among which ``anchored`` chooses, so that they can be encoded before.

    At most ``CANDIDATES`` captions of the data set, of images that the run does not see as well: the most frequent and,
    among equally frequent ones, evenly spaced. A caption that a forgotten image has too would relabel it to itself, so
    it is none of them; where there is no other, the empty caption is the only one.

    Args:
        lists: Images of the run; None for a rehearsal, which has no captions.
    """
    if lists is None:
        return [NULL_CAPTION]
    # What a retained image was selected by is an earlier request, which it rehearses.
    retained = [image.condition[1] for image in lists.retain if not image.selected_by]
    return _captions_apart(retained, [image.condition[1] for image in lists.forget])


def anchored(
    config: Config, model: LatentModel, lists: ImageLists | None, forget: Batches, encode: Encode, console: Console
) -> Config:
    """Fill in the anchor prompt of ``config`` if ``needs_anchor``.

    The anchor is the retained caption under which the model denoises the forgotten images best: its answer to what they
    show if their own caption is not among the choices. A rehearsal, which has no captions, takes the empty one.

    Args:
        config: Configuration with all other defaults.
        model: The model before the run.
        lists: Images of the run; None for a rehearsal.
        forget: Batches of forgotten images.
        encode: Encodes prompts; it has encoded the ``anchor_candidates``, each alone.
        console: Console for the choice.
    """
    if not needs_anchor(config):
        return config
    prompt = NULL_CAPTION
    if lists is not None and isinstance(forget, CachedBatches):
        peers = ControlPlane.current()
        # The main rank alone where the denoiser is still on the disk: no other need hold all of it.
        searches = peers.is_main or not model.denoiser_is_meta
        captions = anchor_candidates(lists)
        nearest = nearest_caption(model, captions, forget.images, encode, seed=config.seed) if searches else None
        prompt = peers.broadcast_object(nearest)
        console.print(f'Anchor: "{prompt}"; another can be given with --anchor-prompts.', markup=False, highlight=False)
    settings = config.text_to_image.model_copy(update={"anchor_prompts": (prompt,)})
    return config.model_copy(update={"text_to_image": settings})


def nearest_caption(
    model: LatentModel, captions: Sequence[str], forget: CachedImages, encode: Encode, *, seed: int
) -> str:
    """Find the one of ``captions`` under which the images of ``forget`` have the least loss.

    They are ``anchor_candidates``: where that is the empty caption alone, it is the anchor.
    """
    captions = list(captions)
    if captions == [NULL_CAPTION]:
        return NULL_CAPTION
    batch = _sample_batch(model, forget)
    denoiser = model.materialize_denoiser()
    for count, draws in ((FINALISTS, 1), (1, DRAWS)):
        encoded = [encode((caption,)) for caption in captions]
        losses = condition_losses(
            denoiser,
            batch,
            {name: torch.cat([one[name] for one in encoded]).to(torch.float32) for name in encoded[0]},
            process=model.process,
            denoiser=model.predict,
            draws=draws,
            seed=seed,
        )
        best = losses.argsort(stable=True)[:count].tolist()
        captions = [captions[number] for number in best]
    return captions[0]


def _captions_apart(retained: Sequence[str], forgotten: Sequence[str]) -> list[str]:
    """Candidates among the captions ``retained`` that no forgotten image has."""
    known = set(forgotten)
    return _candidates([caption for caption in retained if caption not in known])


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


def _sample_batch(model: LatentModel, images: CachedImages) -> dict[str, Tensor]:
    """A batch of at most ``IMAGES`` images of the most frequent size, evenly spaced in the set."""
    size, _ = Counter(entry.size for entry in images.entries).most_common(1)[0]
    entries = [entry for entry in images.entries if entry.size == size]
    count = min(IMAGES, len(entries))
    spaced = [entries[number * len(entries) // count] for number in range(count)]
    return stacked([images.row(entry) for entry in spaced], model.device)
