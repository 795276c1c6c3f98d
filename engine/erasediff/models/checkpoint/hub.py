"""Hugging Face hub: repositories from its cache or downloaded, and tokenizers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import CLIPTokenizer

from erasediff.errors import UserError
from erasediff.io.file_faults import fault_of
from erasediff.io.json_file import read_object


def is_hub_id(source: str) -> bool:
    """Return true if ``source`` has the form of a repository on the hub, owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def downloaded(repository: str, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Download the files of a repository that match ``patterns``, or find them in the cache; return their folder.

    Raises:
        UserError: The repository is neither in the cache nor can it be downloaded.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), ignore_patterns=list(ignored)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{repository} is no folder here, and it is neither in the cache of the Hugging Face hub nor can it be "
            "downloaded: check the name, the connection, and whether the model asks for a login."
        ) from error


CLIP = "openai/clip-vit-large-patch14"


def tokenizer_from_folder(index: Mapping[str, Any], path: Path, component: str) -> Any:
    """Load a tokenizer from a pipeline folder. UserError if it is missing or damaged."""
    entry = index.get(component)
    library, name = entry if isinstance(entry, list | tuple) else (None, None)
    cls: Any = getattr(transformers, name, None) if library == "transformers" and name else None
    is_tokenizer = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedTokenizerBase)
    if cls is not None and not is_tokenizer:
        raise UserError(f"The {component} of {path} is a {name}, which is no tokenizer: the checkpoint is damaged.")
    vocabularies = ("tokenizer.json", "vocab.json", "spiece.model")
    if cls is None or not any((path / component / name).is_file() for name in vocabularies):
        raise UserError(f"The checkpoint {path} is incomplete: it has no {component}.")
    for file in sorted((path / component).iterdir()):
        if file.suffix == ".json":
            read_object(file, infinity=True)
        # A list of merges may be empty; a pointer in its place would be read as merges.
        if (file.is_symlink() or file.stat().st_size) and (fault := fault_of(file)):
            raise UserError(f"{file} cannot be read: {fault}.")
    try:
        return cls.from_pretrained(path / component, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # Parsers of several formats, each with errors of its own.
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(f"The {component} of {path} is damaged: {reason}.") from error


def clip_tokenizer(pad_token: str) -> Any:
    """Load CLIP's tokenizer, which every SD and SDXL model uses, from the hub or its cache.

    Args:
        pad_token: "<|endoftext|>" for OpenAI's text encoder, "!" for OpenCLIP's.

    Raises:
        UserError: The tokenizer is neither in the cache nor can it be downloaded.
    """
    try:
        folder = downloaded(CLIP, ("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"))
    except UserError as error:
        raise UserError(
            f"A single file comes without its tokenizer, and {CLIP} is neither in the cache of the Hugging Face hub "
            "nor can it be downloaded: give a diffusers folder of the same family as config."
        ) from error
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, pad_token=pad_token)
