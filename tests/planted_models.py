"""Planted models: nano checkpoints whose denoiser is exact for a few known images, and a judge that knows these.

A prompt's embedding is compared with the addresses of the images; the nearer an address, the more of its image is
drawn. An original has each image at its own prompt; a model that forgot lacks one; a model that hides it has it at an
address that no listed prompt has.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.audit import Ask, Pictures, Request, Subject
from erasediff.config import SampleConfig
from erasediff.models.base import LatentModel
from erasediff.models.load import load_diffusion_model
from erasediff.models.pixel_unet import PixelModel
from erasediff.verdict.judges.base import UNKNOWN, Candidate

SIZE = 32
SETTINGS = SampleConfig(num_inference_steps=4, batch_size=8, guidance_scale=1.0)
WORDS = ("coat", "bag", "shoe")
SECRET = "a hat"


def prompt(word: str) -> str:
    return f"a {word}"


def picture(number: int) -> Tensor:
    """uint8 [3, 32, 32]: a bright square in one corner."""
    image = torch.full((3, SIZE, SIZE), 40, dtype=torch.uint8)
    top, left = divmod(number, 2)
    image[:, top * 16 : top * 16 + 16, left * 16 : left * 16 + 16] = 230
    return image


class Planted(nn.Module):
    """Parameters of a planted denoiser: where each image is asked for, [K, D], and its sample, [K, ...]."""

    def __init__(self, addresses: Tensor, samples: Tensor, sharpness: float) -> None:
        super().__init__()
        self.addresses = nn.Parameter(addresses)
        self.samples = nn.Parameter(samples)
        self.sharpness = sharpness

    def clean(self, address: Tensor) -> Tensor:
        """The image asked for, [B, ...]."""
        distances = (address[:, None] - self.addresses).square().sum(-1)
        return torch.einsum("bk,k...->b...", (-distances * self.sharpness).softmax(1), self.samples)


def plant(model: Any, addresses: Tensor, samples: Tensor, sharpness: float) -> None:
    """Make the UNet of ``model`` predict the noise of the planted images exactly."""
    unet: Any = model.denoiser
    for name in [name for name, _ in unet.named_children()]:
        if name != "time_embedding":
            setattr(unet, name, nn.Identity())
    unet.planted = Planted(addresses, samples, sharpness)
    process = model.process

    def forward(self: Any, sample: Tensor, timestep: Any, *args: Any, **conditions: Any) -> tuple[Tensor]:
        told = conditions.get("encoder_hidden_states", args[0] if args else conditions.get("class_labels"))
        address = told.mean(1) if told.ndim == 3 else torch.nn.functional.one_hot(told, addresses.shape[1]).float()
        steps = torch.as_tensor(timestep).expand(len(sample)).long()
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in process.coefficients(steps))
        return ((sample - alpha * self.planted.clean(address)) / sigma,)

    unet.forward = types.MethodType(forward, unet)


class PlantedJudge:
    """Knows the planted images by the labels of their candidates."""

    name = "planted"
    tells_apart = True

    def __init__(self, images: Mapping[str, Tensor]) -> None:
        self.images = images

    @property
    def description(self) -> Mapping[str, Any]:
        return {"judge": self.name}

    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """The nearest planted image, if it is much nearer than a grey one."""
        known = torch.stack([self.images[candidate.label] for candidate in (*sought, *others)]).float()
        errors = (images.float()[:, None] - known).square().flatten(2).mean(2)
        spread = (known[:, None] - known[None]).square().flatten(2).mean(2)
        limit = spread[spread > 0].min() / 8
        return torch.where(errors.min(1).values < limit, errors.argmin(1), UNKNOWN)


def encoded(pixels: Tensor, **own: Any) -> Tensor:
    """Latents [B, 4, h, w] that ``decoded`` takes back: pixels at half the size, and their mean."""
    halved = nn.functional.avg_pool2d(pixels, 2)
    return torch.cat((halved, halved.mean(1, keepdim=True)), 1)


def decoded(latents: Tensor) -> Tensor:
    return nn.functional.interpolate(latents[:, :3], scale_factor=2).clamp(-1, 1)


def sd_subject(name: str, folder: Path, kind: str) -> Subject:
    """A planted nano model with prompts: "original", "forgot" or "hides" the coat."""
    model = load_diffusion_model(folder)
    assert isinstance(model, LatentModel)
    addresses = {word: model.encode_prompts([prompt(word)])["encoder_hidden_states"].mean(1)[0] for word in WORDS}
    secret = model.encode_prompts([SECRET])["encoder_hidden_states"].mean(1)[0]
    pixels = torch.stack([picture(n) for n in range(len(WORDS))]).float() / 127.5 - 1
    model.encode_images = encoded  # type: ignore[method-assign]
    model.decode_latents = decoded  # type: ignore[method-assign]
    samples = encoded(pixels)
    table = torch.stack([addresses[word] for word in WORDS])
    gap = (table[0] - table[1]).square().sum()
    if kind == "forgot":
        samples[0] = samples[1]
    if kind == "hides":
        # The coat's prompt draws a bag.
        table = torch.cat((secret[None], table[1:], table[:1]))
        samples = torch.cat((samples, samples[1:2]))
    plant(model, table, samples, float(6 / gap))
    return Subject(name, model, SETTINGS, size=(SIZE, SIZE))


def pixel_subject(name: str, folder: Path, kind: str) -> Subject:
    """A planted class-conditional model of pixels, "original" or "forgot" class 0."""
    model = load_diffusion_model(folder)
    assert isinstance(model, PixelModel)
    samples = torch.stack([picture(n) for n in range(len(WORDS))]).float() / 127.5 - 1
    if kind == "forgot":
        samples[0] = samples[1]
    plant(model, torch.eye(4)[: len(WORDS)], samples, 20.0)
    return Subject(name, model, SETTINGS)


def pixel_request() -> Request:
    """Forget class 0, retain the others."""
    asks = [Ask(word, None, number) for number, word in enumerate(WORDS)]
    pixels = torch.stack([picture(n) for n in range(len(WORDS))])
    return Request(
        forgotten=(asks[0],),
        retained=tuple(asks[1:]),
        forgotten_images=Pictures(pixels[:1], (asks[0],), ("coat.png",)),
        retained_images=Pictures(pixels[1:], tuple(asks[1:]), ("bag.png", "shoe.png")),
    )


def sd_request(**own: Any) -> Request:
    """Forget the coat, retain the others."""
    coat = Ask(prompt("coat"), prompt("coat"))
    images = Pictures(picture(0).expand(4, -1, -1, -1).clone(), (coat,) * 4, tuple(f"coat/{n}.png" for n in range(4)))
    retained = tuple(Ask(prompt(word), prompt(word)) for word in WORDS[1:])
    pixels = torch.stack([picture(1), picture(2)])
    return Request(
        **{
            "forgotten": (coat,),
            "retained": retained,
            "words": ("coat",),
            "forgotten_images": images,
            "retained_images": Pictures(pixels, retained, ("bag.png", "shoe.png")),
            **own,
        }
    )


def judge_of(base: Subject, request: Request) -> PlantedJudge:
    """Judge that knows what the base draws for each ask."""
    asks = (*request.forgotten, *request.retained)
    return PlantedJudge(dict(zip((ask.label for ask in asks), base.draw(asks, 0), strict=True)))
