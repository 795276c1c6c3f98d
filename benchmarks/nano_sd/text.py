"""A CLIP tokenizer and text encoder for the prompts, learned as CLIP's was: by telling images and captions apart."""

from __future__ import annotations

import re
from itertools import pairwise

import torch
from fashion import CLASSES, PHRASES, SIZE, TEMPLATES, Clothes, prompt
from pixels import as_rgb
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from erasediff.utils.progress import progress_bar

TOKENS = 12
WIDTH = 64
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'!"


def build_tokenizer() -> CLIPTokenizer:
    """One token for each word of the prompts, and one per character for every other word."""
    tokens = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    merges = []
    words = re.findall("[a-z]+", " ".join((*TEMPLATES, *PHRASES.values())).lower())
    for word in dict.fromkeys(words):
        characters = [*word[:-1], f"{word[-1]}</w>"]
        beginnings = ["".join(characters[:count]) for count in range(1, len(characters) + 1)]
        merges += [
            (beginning, characters[count])
            for count, (beginning, longer) in enumerate(pairwise(beginnings), start=1)
            if longer not in tokens
        ]
        tokens += [token for token in beginnings if token not in tokens]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS, pad_token="<|endoftext|>")


def train_text_encoder(
    clothes: Clothes,
    tokenizer: CLIPTokenizer,
    steps: int,
    seed: int,
    console: Console,
    device: torch.device | str = "cpu",
) -> tuple[CLIPTextModel, float]:
    """The text encoder of a small CLIP (Radford et al. 2021), and how often that names the images of the last steps.

    Each image of a batch is held against one caption per class, in a template drawn for the step.
    """
    torch.manual_seed(seed)
    model = _build(tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    recognised = 0.0
    with progress_bar(console, "Text encoder", steps) as bar:
        for step in range(steps):
            index = torch.randint(len(clothes), (128,))
            captions = [prompt(label, int(torch.randint(len(TEMPLATES), ()))) for label in range(len(CLASSES))]
            tokens = tokenizer(captions, padding="max_length", return_tensors="pt").to(device)
            labels = clothes.labels[index].to(device)
            scores = model(**tokens, pixel_values=as_rgb(clothes.images[index].to(device))).logits_per_image
            loss = cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right = (scores.argmax(1) == labels).double().mean().item()
            recognised += (right - recognised) / min(step + 1, 20)
            bar.advance()
            bar.note(f"recognised {recognised:.0%}")
    encoder = CLIPTextModel(model.config.text_config)
    encoder.load_state_dict(model.cpu().state_dict(), strict=False)
    return encoder, recognised


def _build(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": WIDTH,
    }
    vision = {**shared, "image_size": SIZE, "patch_size": 8, "projection_dim": WIDTH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
