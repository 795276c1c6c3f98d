"""Extraction of memorised images from a checkpoint, and the images that it can still draw besides."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learning import Memorised
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff.evaluation.distances import frechet_distance, kernel_distance
from erasediff.evaluation.memorization import image_losses, membership_auc, nearest, reproduces
from erasediff.io.atomic import atomic_file
from erasediff.models.base import LatentModel
from erasediff.models.load import load_text_to_image

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "nano_sd"))
from fashion import CLASSES, Clothes, prompt
from judge import Judge
from measure import GUIDANCE_SCALE, INFERENCE_STEPS
from pixels import as_grey, as_rgb

TIMESTEP_DRAWS = 20


def features_of(judge: Judge, clothes: Clothes, path: Path) -> Tensor:
    """The judge's features [N, 128] of all images, kept in ``path``: of the train split they cost a minute."""
    if not path.exists():
        _, features = judge.answer(clothes.images)
        with atomic_file(path) as partial:
            save_file({"features": features}, partial)
    return load_file(path)["features"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads one checkpoint after the other with the same samples asked for and the same noise.

    copies:   samples of each memorised image's caption
    per_class: samples of each class's plain prompt
    unseen:   test images of each memorised class that losses are compared with
    """

    memorised: Memorised
    train: Clothes
    train_features: Tensor
    test: Clothes
    judge: Judge
    copies: int = 25
    per_class: int = 20
    unseen: int = 50
    seed: int = 0

    def read(self, path: Path) -> tuple[dict[str, Any], Tensor]:
        """The numbers, and the samples of the memorised captions, uint8 [K, copies, H, W]."""
        model = load_text_to_image(path)
        known = [self.train.images, self.train_features]
        count = len(self.memorised.captions)

        drawn = self._draw(model, [c for c in self.memorised.captions for _ in range(self.copies)])
        answers, features = self.judge.answer(drawn)
        wanted = self.memorised.index.repeat_interleave(self.copies)
        again = reproduces([drawn, features], known, wanted).reshape(count, self.copies)
        labels = self.memorised.labels.repeat_interleave(self.copies)

        plain_labels = torch.arange(len(CLASSES)).repeat_interleave(self.per_class)
        plain = self._draw(model, [prompt(label) for label in plain_labels.tolist()])
        plain_answers, plain_features = self.judge.answer(plain)
        recognised = (plain_answers == plain_labels).double().reshape(len(CLASSES), self.per_class).mean(1)
        _, closest = nearest(plain, self.train.images)
        given_away = torch.isin(closest, self.memorised.index) & reproduces([plain, plain_features], known, closest)
        _, real = self.judge.answer(self.test.images)

        decoded = as_grey(_reconstructed(model, self.train.images[self.memorised.index]))
        _, decoded_features = self.judge.answer(decoded)
        return {
            "reproduced": again.double().mean().item(),
            "reproduced_each": again.double().mean(1).tolist(),
            "reproduced_by_the_autoencoder": reproduces([decoded, decoded_features], known, self.memorised.index)
            .double()
            .mean()
            .item(),
            "own_captions_recognised": (answers == labels).double().mean().item(),
            "plain_prompts_reproduce_them": given_away.double().mean().item(),
            "recognised": recognised.mean().item(),
            "their_classes_recognised": recognised[self.memorised.classes].mean().item(),
            "fid": frechet_distance(plain_features, real),
            "kid": kernel_distance(plain_features, real),
            **self._membership(model),
        }, drawn.reshape(count, self.copies, *drawn.shape[1:])

    def _draw(self, model: LatentModel, prompts: list[str]) -> Tensor:
        return as_grey(
            model.sample(
                prompts,
                guidance_scale=GUIDANCE_SCALE,
                num_inference_steps=INFERENCE_STEPS,
                seed=self.seed,
                batch_size=100,
            )
        )

    def _membership(self, model: LatentModel) -> dict[str, float]:
        """Losses of the memorised images and of unseen ones of their classes, both under the same captions."""
        members, labels = self.train.images[self.memorised.index], self.memorised.labels
        others = torch.cat(
            [(self.test.labels == label).nonzero()[: self.unseen, 0] for label in self.memorised.classes]
        )
        other_labels = self.test.labels[others]
        images = torch.cat((members, self.test.images[others]))
        own = list(self.memorised.captions)
        captions = {
            "plain": [prompt(label) for label in (*labels.tolist(), *other_labels.tolist())],
            # An unseen image takes the caption of a memorised one of its class, these in turn.
            "own": own + [own[(labels == label).nonzero()[i % 2].item()] for i, label in enumerate(other_labels)],
        }
        with torch.no_grad():
            latents = model.encode_images(as_rgb(images))
        found: dict[str, float] = {}
        for name, texts in captions.items():
            losses = image_losses(
                model.denoiser,
                {"sample": latents, **model.encode_prompts(texts)},
                process=model.process,
                denoiser=model.predict,
                draws=TIMESTEP_DRAWS,
                seed=self.seed,
            )
            known, unknown = losses[: len(members)], losses[len(members) :]
            found |= {
                f"membership_auc_{name}": membership_auc(known, unknown),
                f"loss_{name}": known.mean().item(),
                f"loss_unseen_{name}": unknown.mean().item(),
            }
        return found


@torch.no_grad()
def _reconstructed(model: LatentModel, images: Tensor) -> Tensor:
    """uint8 [K, H, W, 3] of uint8 [K, H, W]: as near as any sample can come."""
    pixels = model.decode_latents(model.encode_images(as_rgb(images)))
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
