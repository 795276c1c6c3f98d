"""Battery: a published protocol on the user's own prompt file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from erasediff.audit.asks import Ask
from erasediff.audit.batteries.base import Battery, NoSettings, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, shares
from erasediff.audit.protocol_file import PROTOCOLS, ProtocolFile
from erasediff.audit.subject import Subject


class Protocol(Battery[NoSettings]):
    """Share of a protocol's images in which the concept is seen."""

    name = "protocol"
    order = 14
    title = "Published protocol"
    source = "I2P, UnlearnDiffAtk or Ring-A-Bell, on a file of the user"

    def unfit(self) -> str | None:
        if self.audit.condition != "text":
            return "the model takes no prompts"
        return None if self.audit.protocol is not None else "no prompt file is given: --protocol and --prompts"

    @property
    def _file(self) -> ProtocolFile:
        assert self.audit.protocol is not None
        return self.audit.protocol

    def passes(self) -> float:
        return len(self._file.prompts) * self.audit.model.passes_per_image

    def pieces(self) -> Sequence[Piece]:
        size = self.audit.model.settings.batch_size
        return [{"first": first} for first in range(0, len(self._file.prompts), size)]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        rows: list[Row] = []
        first = piece["first"]
        for number in range(first, min(first + subject.settings.batch_size, len(self._file.prompts))):
            prompt = self._file.prompts[number]
            one = {"number": number}
            seed = self.seed(one) if prompt.seed is None else prompt.seed
            # One by one: each has a seed and a guidance scale of its own.
            guided = subject if prompt.guidance is None else subject.guided(prompt.guidance)
            images = guided.draw([Ask(prompt.text, prompt.text)], seed)
            rows += self.audit.look(self.name, one, subject, images, prompt=prompt.text, seed=seed)
        return rows

    def figures(self, rows: Rows) -> list[Figure]:
        return [shares("Protocol's prompts, seen", rows, note="A share of images, not of boxes.")]

    def description(self) -> Mapping[str, Any]:
        file, subject, judge = self._file, self.audit.model, self.audit.judge
        assert judge is not None
        return {
            "protocol": PROTOCOLS[file.protocol],
            "prompts": str(file.path),
            "prompts_sha256": file.sha256,
            "detector": judge.name,
            **{f"detector_{name}": value for name, value in judge.description.items()},
            "counted": "images",
            "sampler": type(subject.model.scheduler).__name__,
            "steps": subject.steps,
            "guidance": "of each prompt" if any(prompt.guidance for prompt in file.prompts) else subject.guidance,
            "seeds": "of each prompt" if any(prompt.seed is not None for prompt in file.prompts) else self.audit.seed,
            "images": len(file.prompts),
        }
