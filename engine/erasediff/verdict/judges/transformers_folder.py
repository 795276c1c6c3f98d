"""Networks of ``transformers`` in local folders: weights by safetensors alone, nothing unpickled, no remote code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from erasediff.errors import UserError
from erasediff.io.json_file import read_object
from erasediff.io.tensor_file import TensorFile
from erasediff.io.user_file import check_regular
from erasediff.models.checkpoint.components import check_sizes

CONFIG = "config.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
READ = (".json", ".safetensors", ".txt", ".model")
"""Suffixes of the files that networks, tokenizers and image processors are read from."""


@dataclass(frozen=True, slots=True)
class TransformersFolder:
    """Folder of a network, as ``save_pretrained`` writes it.

    Attributes:
        path: The folder.
        config: Its config.json.
    """

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> TransformersFolder:
        """Read the configuration. UserError for a folder that is none of a network of ``transformers``."""
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give one with the config.json and .safetensors of a judge.")
        try:
            config = read_object(path / CONFIG)
        except FileNotFoundError:
            raise UserError(f"{path} has no {CONFIG}: give the folder of a network of transformers.") from None
        check_sizes(f"the judge in {path}", config)
        for part in config.values():
            if isinstance(part, dict):
                check_sizes(f"the judge in {path}", part)
        if "quantization_config" in config:
            raise UserError(f"The judge in {path} is quantized: give its weights in float32, float16 or bfloat16.")
        return cls(path, config)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    def load(self, automatic: Any, device: torch.device) -> nn.Module:
        """Load the network in float32, in evaluation mode.

        Args:
            automatic: Automatic class of ``transformers``, such as ``AutoModel``.
            device: Device of the weights.

        Raises:
            UserError: The folder holds no network of that class, or its weights are not those of the configuration.
        """
        weights = dict(self._weights())
        with self._faults("network"):
            config = transformers.AutoConfig.for_model(**self.config)
            network_class = automatic._model_mapping[type(config)]
            # From tensors in memory: no other file of the folder is looked for.
            model, info = network_class.from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
            )
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"The judge in {self.path} is incomplete: it has no weight {missing[0]}.")
        network: nn.Module = model.to(device).requires_grad_(False).eval()
        return network

    def image_processor(self) -> Any:
        """Image processor. UserError for a folder without one."""
        with self._faults("image processor"):
            return transformers.AutoImageProcessor.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False, backend="pil"
            )

    def tokenizer(self) -> Any:
        """Tokenizer. UserError for a folder without one."""
        if not any((self.path / name).exists() for name in VOCABULARIES):
            # transformers would make an empty one.
            raise UserError(f"{self.path} has no tokenizer: copy its {VOCABULARIES[0]} too.")
        with self._faults("tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)

    def digests(self) -> dict[str, str]:
        """SHA-256 in hex of each file that a judge may be read from, by name."""
        return {path.name: sha256(path) for path in sorted(self.path.iterdir()) if path.suffix in READ}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        whole = self.path / "model.safetensors"
        # Variants of it and its shards may lie beside it.
        files = [whole] if whole.exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{self.path} has no .safetensors: convert its weights, since pickles are not opened.")
        for file in files:
            for name, tensor in TensorFile.open(file).tensors.items():
                yield name, tensor.load()

    @contextmanager
    def _faults(self, part: str) -> Iterator[None]:
        """Report whatever a constructor finds wrong with its settings as a UserError that names the folder."""
        level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).partition("\n")[0].split())[:300].rstrip(".") or type(error).__name__
            raise UserError(f"The {part} of the judge in {self.path} cannot be read: {reason}.") from error
        finally:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()


def sha256(path: Path) -> str:
    """SHA-256 in hex of a file. UserError for a folder, pipe or device."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
