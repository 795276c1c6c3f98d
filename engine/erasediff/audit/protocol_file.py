"""Prompt file of a published protocol (I2P, UnlearnDiffAtk, Ring-A-Bell): prompts with seeds and guidance scales."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from erasediff.errors import UserError
from erasediff.io.user_file import read_bytes

PROTOCOLS: Mapping[str, str] = {
    "i2p": "I2P (Schramowski et al. 2023, arXiv 2211.05105): one image of each prompt, at its own seed and guidance",
    "uda": "UnlearnDiffAtk's prompts (Zhang et al. 2024, arXiv 2310.11868)",
    "ring-a-bell": "Ring-A-Bell's prompts (Tsai et al. 2024, arXiv 2310.10012)",
}
"""Protocols by name, with their sources."""
PROMPT_COLUMNS = ("prompt", "adv_prompt", "sensitive prompt", "text", "caption")
SEED_COLUMNS = ("seed", "sd_seed", "evaluation_seed")
GUIDANCE_COLUMNS = ("guidance", "sd_guidance_scale", "evaluation_guidance")
LARGEST = 64 * 2**20


@dataclass(frozen=True, slots=True)
class ProtocolPrompt:
    """A prompt with the seed and guidance scale that its file gives, None where it gives none."""

    text: str
    seed: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class ProtocolFile:
    """Prompt file of the user.

    Attributes:
        protocol: Name of the protocol, of ``PROTOCOLS``.
        path: The file.
        sha256: Of its content.
        prompts: In the file's order.
    """

    protocol: str
    path: Path
    sha256: str
    prompts: tuple[ProtocolPrompt, ...]

    @classmethod
    def read(cls, protocol: str, path: Path) -> ProtocolFile:
        """Read a .csv with a column of prompts, and maybe of seeds and guidance scales, or a .txt of a prompt a line.

        Raises:
            UserError: There is no such protocol, or the file has no prompts or a seed that is no number.
        """
        if protocol not in PROTOCOLS:
            raise UserError(f'There is no protocol "{protocol}": give one of {", ".join(PROTOCOLS)}.')
        try:
            content = read_bytes(path, LARGEST)
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"Cannot read the prompts in {path}: give a .csv or .txt file in UTF-8.") from None
        prompts = _of_table(path, text) if path.suffix == ".csv" else _of_lines(text)
        if not prompts:
            raise UserError(f"There are no prompts in {path}.")
        return cls(protocol, path, hashlib.sha256(content).hexdigest(), tuple(prompts))


def _of_lines(text: str) -> list[ProtocolPrompt]:
    lines = (line.strip() for line in text.splitlines())
    return [ProtocolPrompt(line) for line in lines if line and not line.startswith("#")]


def _of_table(path: Path, text: str) -> list[ProtocolPrompt]:
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error}.") from None
    columns = rows[0].keys() if rows else ()
    prompt, seed, guidance = (
        next((name for name in names if name in columns), None)
        for names in (PROMPT_COLUMNS, SEED_COLUMNS, GUIDANCE_COLUMNS)
    )
    if rows and prompt is None:
        raise UserError(f"{path} has no column of prompts: call it {PROMPT_COLUMNS[0]}.")
    found = []
    for number, row in enumerate(rows, start=2):
        try:
            found.append(
                ProtocolPrompt(
                    row[prompt or ""] or "",
                    int(row[seed]) if seed and row[seed] else None,
                    float(row[guidance]) if guidance and row[guidance] else None,
                )
            )
        except ValueError:
            raise UserError(f"{path}, line {number} has a seed or guidance scale that is no number.") from None
    return found
