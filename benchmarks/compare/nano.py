"""Forgetting a garment of the nano Stable Diffusion: quality, and three attempts to bring it back."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fashion import CLASSES, DEBIAN_FOLDER, TEMPLATES, Clothes, load, prompt
from judge import Judge
from measure import CACHE, GUIDANCE_SCALE, INFERENCE_STEPS
from pixels import as_grey, as_rgb
from rich.console import Console
from settings import METHODS
from torch import Tensor, nn
from train import take

from erasediff.comparison import Case
from erasediff.comparison.digits_task import OTHER_NOISE
from erasediff.comparison.harness import Measurement
from erasediff.errors import UserError
from erasediff.evaluation.attacks import (
    PromptSearch,
    RepeatedBatches,
    for_latents,
    in_place_of,
    relearning_curve,
    textual_inversion,
)
from erasediff.evaluation.distances import frechet_distance, gaussian_distance, kernel_distance
from erasediff.evaluation.metrics import upper_bound
from erasediff.methods.sparse_autoencoder import ERASER
from erasediff.models.load import load_text_to_image
from erasediff.models.stable_diffusion import StableDiffusion
from erasediff.models.text_tokens import text_encoders
from erasediff.sae import ConceptEraser

ATTACKED_IMAGES = 100
FITTED_IMAGES = 10_000
RELEARNING_STEPS, RELEARNING_LR = (5, 10, 20, 40), 1e-4
ATTACKED = ("base", "erasediff", "salun", "esd", "selective-amnesia", "pruning", "saemnesia")
"""The controls have forgotten nothing: there is nothing to bring back."""

DETACHED = "saemnesia"
"""Its eraser is attached to the model; whoever trains the weights takes it off, so relearning says nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoTask:
    """``per_class`` images are drawn of each garment and ``forgotten`` of the forgotten one."""

    garment: str
    per_class: int = 30
    forgotten: int = 60

    def __post_init__(self) -> None:
        if self.garment not in CLASSES:
            raise UserError(f"There is no garment {self.garment}: choose one of {', '.join(CLASSES)}.")

    @property
    def name(self) -> str:
        return f"nano/{self.garment}"

    @property
    def label(self) -> int:
        return CLASSES.index(self.garment)

    def base(self, seed: int, console: Console) -> Path:
        if not (CACHE / "model").exists():
            take(CACHE, DEBIAN_FOLDER, console)
        return CACHE / "model"

    def settings(self, method: str) -> Mapping[str, Any]:
        if method not in METHODS:
            raise UserError(f"The nano model is not compared with {method}: choose from {', '.join(METHODS)}.")
        return METHODS[method](self.garment)

    def measurements(self, method: str) -> Mapping[str, Measurement]:
        attacks: dict[str, Measurement] = {
            "relearning": self.relearning,
            "inversion": self.inversion,
            "prompts": self.prompts,
        }
        if method == DETACHED:
            del attacks["relearning"]
        return {"quality": self.quality} | (attacks if method in ATTACKED else {})

    def quality(self, path: Path, case: Case, oracle: Path | None) -> Mapping[str, Any]:
        """Classes of the images of every garment, and their distances from the real test images."""
        counts = torch.full((len(CLASSES),), self.per_class)
        counts[self.label] = self.forgotten
        labels = torch.arange(len(CLASSES)).repeat_interleave(counts)
        answers, features = _seen(_model(path), [prompt(label) for label in labels.tolist()], case.seed)
        right = answers == labels
        recognised = [right[labels == c].double().mean().item() for c in range(len(CLASSES))]
        others = [share for c, share in enumerate(recognised) if c != self.label]
        retained = labels != self.label
        equal = torch.cat([torch.nonzero(labels == c)[: self.per_class, 0] for c in range(len(CLASSES))])
        real, test = _real_features(), _clothes("t10k").labels
        agreement = _agreement(features, labels)
        values = {
            "recognised": recognised,
            "asked": counts.tolist(),
            "forget": [self.label],
            "forgotten_rate": recognised[self.label],
            "forgotten_bound": upper_bound(right[~retained]),
            "forgotten_elsewhere": (answers[retained] == self.label).double().mean().item(),
            "retained_mean": sum(others) / len(others),
            "retained_worst": min(others),
            "agreement_retained": agreement[retained].mean().item(),
            "agreement_forgotten": agreement[~retained].mean().item(),
            "fid_all": frechet_distance(features[equal], real),
            "kid_all": kernel_distance(features[equal], real),
            "fid_retained": frechet_distance(features[retained], real[test != self.label]),
            "kid_retained": kernel_distance(features[retained], real[test != self.label]),
        }
        if oracle is not None:
            _, theirs = _seen(_model(oracle), [prompt(label) for label in labels.tolist()], case.seed + OTHER_NOISE)
            values["oracle_retained"] = gaussian_distance(features[retained], theirs[retained])
            values["oracle_forgotten"] = gaussian_distance(features[~retained], theirs[~retained])
        return values

    def relearning(self, path: Path, case: Case, oracle: Path | None) -> Mapping[str, Any]:
        """The rate over steps of fine-tuning on real images of the garment."""
        model = _model(path)
        latents = self._latents(model)
        condition = for_latents(model, model.encode_prompts([prompt(self.label)]), latents)
        batches = RepeatedBatches(latents, condition, batch_size=32)
        curve = relearning_curve(
            model.denoiser,
            model.process,
            batches,
            lambda: self._rate(model, prompt(self.label), case.seed, count=self.per_class),
            steps=RELEARNING_STEPS,
            lr=RELEARNING_LR,
            denoiser=model.predict,
            seed=case.seed,
        )
        return {"images": ATTACKED_IMAGES, "lr": RELEARNING_LR, "curve": curve}

    def inversion(self, path: Path, case: Case, oracle: Path | None) -> Mapping[str, Any]:
        """The rate with a learned vector in the place of the garment's last word."""
        model, word, asked = _model(path), self.garment.split()[-1], prompt(self.label)
        vector = textual_inversion(model, self._latents(model), asked, word, steps=150, lr=1e-2, seed=case.seed)
        with in_place_of(model, word, vector):
            return {"images": ATTACKED_IMAGES, "steps": 150, "rate": self._rate(model, asked, case.seed)}

    def prompts(self, path: Path, case: Case, oracle: Path | None) -> Mapping[str, Any]:
        """The rate with three found words before the prompt."""
        model = _model(path)
        vocabulary = [word for word in _vocabulary() if word not in self.garment.split()]
        search = PromptSearch(model, self._latents(model), vocabulary, seed=case.seed)
        found = search.search(prompt(self.label), words=3, steps=12, candidates=6)
        return {
            "images": ATTACKED_IMAGES,
            "prompt": found.prompt,
            "loss": found.loss,
            "unattacked_loss": found.unattacked_loss,
            "rate": self._rate(model, found.prompt, case.seed),
        }

    def _rate(self, model: StableDiffusion, asked: str, seed: int, count: int | None = None) -> float:
        answers, _ = _seen(model, [asked] * (count or self.forgotten), seed)
        return (answers == self.label).double().mean().item()

    def _latents(self, model: StableDiffusion) -> Tensor:
        clothes = _clothes("train")
        return model.encode_images(as_rgb(clothes.images[clothes.labels == self.label][:ATTACKED_IMAGES]))


def _seen(model: StableDiffusion, prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """The judge's answers int64 [N] for an image of each prompt, and its features [N, 128]."""
    drawn = model.sample(
        prompts, guidance_scale=GUIDANCE_SCALE, num_inference_steps=INFERENCE_STEPS, seed=seed, batch_size=100
    )
    return _judge().answer(as_grey(drawn))


def _model(path: Path) -> StableDiffusion:
    """The checkpoint at ``path``; where that is an eraser, the nano model with it attached."""
    found = CACHE / "model" if path.name == ERASER else path
    model = load_text_to_image(found, device="cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(model, StableDiffusion)
    if path.name == ERASER:
        ConceptEraser.load(path).attach(model.denoiser)
    return model


@functools.cache
def _judge() -> Judge:
    return Judge.load(CACHE / "judge")


@functools.cache
def _clothes(split: str) -> Clothes:
    return load(DEBIAN_FOLDER, split)


@functools.cache
def _real_features() -> Tensor:
    _, features = _judge().answer(_clothes("t10k").images)
    return features


def _agreement(features: Tensor, labels: Tensor) -> Tensor:
    """[N], the cosine between each image and its prompt, as CLIP's score, both from the mean over all prompts.

    ``features`` [N, 128] are the judge's; a linear map, fitted to real images and their captions, takes them to where
    the model's own text encoder has the prompts.
    """
    projection, texts = _image_side()
    images = nn.functional.pad(features.double(), (0, 1), value=1.0) @ projection
    return nn.functional.cosine_similarity(images, texts[labels])


@functools.cache
def _image_side() -> tuple[Tensor, Tensor]:
    """The least-squares map float64 [129, D] and the prompts' embeddings [classes, D]; the last row is the constant."""
    model = _model(CACHE / "model")
    encoder: Any = model.encoders["text_encoder"]
    [tokens] = text_encoders(model)
    with torch.inference_mode():
        pooled = torch.cat([encoder(tokens.ids(prompt(label))).pooler_output for label in range(len(CLASSES))])
    texts = (pooled - pooled.mean(0)).double().cpu()
    clothes = _clothes("train")
    _, features = _judge().answer(clothes.images[:FITTED_IMAGES])
    inputs = nn.functional.pad(features.double(), (0, 1), value=1.0)
    return torch.linalg.lstsq(inputs, texts[clothes.labels[:FITTED_IMAGES]], driver="gelsd").solution, texts


def _vocabulary() -> list[str]:
    """Every word of the prompts that is one token."""
    text = " ".join(prompt(label, template) for label in range(len(CLASSES)) for template in range(len(TEMPLATES)))
    return sorted({word for word in text.split() if word.isalpha()})
