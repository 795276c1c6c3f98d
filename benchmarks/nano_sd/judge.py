"""A convolutional classifier of the real images, which has never seen a generated one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fashion import CLASSES, Clothes
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from erasediff.io.atomic import atomic_directory
from erasediff.utils.progress import progress_bar

FEATURES = 128


class Judge(nn.Module):
    """Takes grey uint8 [B, 32, 32]; ``accuracy`` is its share of right answers on the 10,000 test images."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = 0.0
        self.layers = nn.Sequential(
            nn.BatchNorm2d(1), *_block(1, 32), nn.MaxPool2d(2), *_block(32, 64), nn.MaxPool2d(2), *_block(64, 64)
        )
        self.inward = nn.Linear(64 * 8 * 8, FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.outward = nn.Linear(FEATURES, len(CLASSES))

    @property
    def device(self) -> torch.device:
        return self.outward.weight.device

    def features(self, images: Tensor) -> Tensor:
        """float32 [B, 128], the last hidden layer: what FID and KID compare."""
        return relu(self.inward(self.layers(images[:, None].float() / 255).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, 10]."""
        scores: Tensor = self.outward(self.dropout(self.features(images)))
        return scores

    @torch.inference_mode()
    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each image, int64 [N], and its features [N, 128]."""
        self.eval()
        features = torch.cat([self.features(part.to(self.device)) for part in images.split(500)])
        return self.outward(features).argmax(1).cpu(), features.cpu()

    def save(self, path: Path) -> None:
        with atomic_directory(path) as folder:
            save_file(self.state_dict(), folder / "classifier.safetensors")
            (folder / "classifier.json").write_text(json.dumps({"test_accuracy": self.accuracy}) + "\n")

    @classmethod
    def load(cls, path: Path) -> Judge:
        judge = cls()
        judge.load_state_dict(load_file(path / "classifier.safetensors"))
        judge.accuracy = json.loads((path / "classifier.json").read_text())["test_accuracy"]
        return judge.eval()


def train_judge(
    train: Clothes, test: Clothes, steps: int, seed: int, console: Console, device: torch.device | str = "cpu"
) -> Judge:
    """Fitted to the train split, half of the images mirrored; its accuracy is taken once, on the test split."""
    torch.manual_seed(seed)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with progress_bar(console, "Classifier", steps) as bar:
        for _ in range(steps):
            index = torch.randint(len(train), (128,))
            images = train.images[index]
            images = torch.where(torch.rand(len(index), 1, 1) < 0.5, images, images.flip(-1))
            loss = cross_entropy(judge(images.to(device)), train.labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.advance()
    answers, _ = judge.answer(test.images)
    judge.accuracy = (answers == test.labels).double().mean().item()
    return judge


def _block(inward: int, outward: int) -> list[nn.Module]:
    return [nn.Conv2d(inward, outward, 3, padding=1, bias=False), nn.BatchNorm2d(outward), nn.ReLU()]
