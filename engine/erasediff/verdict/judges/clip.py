"""Zero-shot judge: the caption that a CLIP or SigLIP of a local folder finds nearest to an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from erasediff.data.phrases import normal_form, words_of
from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.pictures import batches, pictures
from erasediff.verdict.judges.registry import JudgeKind
from erasediff.verdict.judges.transformers_folder import TransformersFolder

FAMILIES = ("clip", "siglip")
TEMPLATE = "a photo of {}"
FUNCTION_WORDS = frozenset({"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "the", "to", "with"})
BATCH_SIZE = 64


class ClipJudge:
    """Zero-shot classification among the candidates' texts (Radford et al. 2021, section 3.1; Zhai et al. 2023).

    A text is the candidate's caption; a bare class name is put into "a photo of {}". There is no answer ``UNKNOWN``.

    Args:
        folder: CLIPModel or SiglipModel with its tokenizer and image processor, as ``save_pretrained`` writes them.
        device: Device of the network.

    Raises:
        UserError: The folder holds no such model, or is damaged.
    """

    name = "clip"
    tells_apart = True

    def __init__(self, folder: Path, device: torch.device) -> None:
        opened = TransformersFolder.open(folder)
        if opened.model_type not in FAMILIES:
            raise UserError(f"{folder} is a {opened.model_type}, not one of {', '.join(FAMILIES)}: give such a folder.")
        self.device = device
        self.tokenizer, self.processor = opened.tokenizer(), opened.image_processor()
        self.model: Any = opened.load(transformers.AutoModel, device)
        self.family = opened.model_type
        self._facts = {"folder": str(folder), "model_type": self.family, "sha256": opened.digests()}

    @property
    def description(self) -> Mapping[str, Any]:
        return {**self._facts, "template": TEMPLATE}

    @torch.no_grad()
    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """See ``Judge.answers``."""
        tokens = self._tokens([prompt_of(candidate) for candidate in (*sought, *others)])
        answers = [torch.empty(0, dtype=torch.int64)]
        for part in batches(images, BATCH_SIZE):
            pixels = self.processor(images=pictures(part), return_tensors="pt")["pixel_values"]
            answers.append(self.model(**tokens, pixel_values=pixels.to(self.device)).logits_per_image.argmax(1).cpu())
        return torch.cat(answers)

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Arguments of the text encoder, padded as the family was trained."""
        text_config, is_siglip = self.model.config.text_config, self.family == "siglip"
        tokens = self.tokenizer(
            texts,
            padding="max_length" if is_siglip else True,
            max_length=text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        if int(tokens["input_ids"].max()) >= text_config.vocab_size:
            raise UserError(
                f"The tokenizer in {self._facts['folder']} has more words than the network: copy both again."
            )
        # SigLIP reads the last place of the padded text, and was trained without a mask.
        names = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.device) for name in names}


def prompt_of(candidate: Candidate) -> str:
    """Text that an image is compared with: the caption, or "a photo of ..." for a bare class name.

    A class name is a text that is also the label, and has no article or preposition.
    """
    is_name = candidate.text == candidate.label and not FUNCTION_WORDS & set(words_of(normal_form(candidate.text)))
    return TEMPLATE.format(candidate.text) if is_name else candidate.text


def _build(argument: str, device: torch.device) -> ClipJudge:
    if not argument:
        raise UserError("The judge clip needs a folder: give clip:FOLDER.")
    return ClipJudge(Path(argument), device)


KIND = JudgeKind("clip", "clip:FOLDER", _build)
