"""Judge that is an image classifier in an ONNX file, run by the optional package ``onnxruntime``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from erasediff.config.yaml_reader import read_yaml
from erasediff.errors import UserError
from erasediff.io.file_faults import fault_of
from erasediff.io.user_file import read_bytes, read_text
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.labels import Labels, indices
from erasediff.verdict.judges.pictures import batches
from erasediff.verdict.judges.registry import JudgeKind

LARGEST = 4 * 10**9
LABEL_KEYS = ("labels", "names", "classes")
"""Keys of a model's metadata that hold its labels; "names" is Ultralytics'."""
NORMALISATION = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}
"""ImageNet's mean and standard deviation by number of channels: RGB, or grey with the means of the three."""
DEFAULT_SIDE = 224
BATCH_SIZE = 64
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


@dataclass(frozen=True, slots=True)
class ImageInput:
    """Image input of a graph.

    Attributes:
        name: Name of the input.
        channels_last: Layout [N, H, W, C] rather than [N, C, H, W].
        channels: 3, or 1 for grey images.
        size: (height, width); 224 where the graph leaves them open.
        batch_size: Images of a call: the graph's own, or 64 where it leaves it open.
        is_fixed: Every call must hold ``batch_size`` images.
        dtype: uint8 takes 0 to 255; others take values that are scaled to [0, 1] and normalised.
    """

    name: str
    channels_last: bool
    channels: int
    size: tuple[int, int]
    batch_size: int
    is_fixed: bool
    dtype: Any

    @classmethod
    def of(cls, session: Any, path: Path) -> ImageInput:
        """Read the graph's input. UserError for a graph that takes anything but one batch of images."""
        inputs = session.get_inputs()
        found = inputs[0]
        shape = [side if isinstance(side, int) and side > 0 else None for side in found.shape]
        if len(inputs) != 1 or len(shape) != 4 or found.type not in DTYPES:
            raise UserError(
                f"{path} takes {', '.join(f'{i.name} {i.shape} {i.type}' for i in inputs)}: give one of images "
                "[N, 3, H, W] or [N, H, W, 3], in float or uint8."
            )
        channels_last = shape[1] not in (1, 3) and shape[3] in (1, 3)
        channels, height, width = (shape[3], shape[1], shape[2]) if channels_last else shape[1:]
        if channels not in (1, 3, None):
            raise UserError(f"{path} takes images of {channels} channels: give a classifier of RGB or grey images.")
        return cls(
            name=found.name,
            channels_last=channels_last,
            channels=channels or 3,
            size=(height or DEFAULT_SIDE, width or DEFAULT_SIDE),
            batch_size=shape[0] or BATCH_SIZE,
            is_fixed=shape[0] is not None,
            dtype=DTYPES[found.type],
        )


class OnnxJudge:
    """The label that a classifier gives an image; ``UNKNOWN`` where it is that of no candidate.

    An image is resized to the graph's size (bicubic, antialiased, whole: nothing is cropped), scaled to [0, 1], and
    normalised by the metadata's "mean" and "std", such as "0.5, 0.5, 0.5", or by ImageNet's. A graph of uint8 images
    gets 0 to 255 as they are. The first output is taken for scores [N, labels].

    Args:
        path: ONNX file; weights in files beside it are not read.
        labels: Text file with a label on each line; None for those in the metadata.
        device: Where the graph is run: a GPU if ``onnxruntime`` is built for it.

    Raises:
        UserError: ``onnxruntime`` is not installed, a file cannot be read, or the graph is no image classifier.
    """

    name = "onnx"
    tells_apart = True

    def __init__(self, path: Path, labels: Path | None, device: torch.device) -> None:
        content = _content(path)
        self.path, self.session = path, _session(content, path, device)
        self.input = ImageInput.of(self.session, path)
        metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        mean, std = (
            _numbers(metadata.get(key), default, path, key)
            for key, default in zip(("mean", "std"), NORMALISATION[self.input.channels], strict=True)
        )
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.labels = Labels(_label_lines(labels) if labels else _label_metadata(metadata, path), str(path))
        self._facts = {
            "file": str(path),
            "sha256": {path.name: hashlib.sha256(content).hexdigest()}
            | ({labels.name: hashlib.sha256(_content(labels)).hexdigest()} if labels else {}),
            "layout": "NHWC" if self.input.channels_last else "NCHW",
            "size": list(self.input.size),
            "normalisation": "none" if self.input.dtype is np.uint8 else {"mean": list(mean), "std": list(std)},
            "labels": len(self.labels.names),
        }

    @property
    def description(self) -> Mapping[str, Any]:
        return self._facts

    @torch.no_grad()
    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """See ``Judge.answers``."""
        by_output = self.labels.by_output(sought, others)
        outputs: list[int] = []
        for part in batches(images, self.input.batch_size):
            outputs += self._scores(part).argmax(1).tolist()
        return torch.tensor(indices(outputs, by_output), dtype=torch.int64)

    def _scores(self, images: Tensor) -> NDArray[Any]:
        """Scores [N, labels] of images uint8 [N, 3, H, W]."""
        pixels = interpolate(images.float(), self.input.size, mode="bicubic", antialias=True).clamp(0, 255)
        if self.input.channels == 1:
            # Luma of ITU-R BT.601, as Pillow's.
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        pixels = pixels.round() if self.input.dtype is np.uint8 else (pixels / 255 - self.mean) / self.std
        count = len(pixels)
        if self.input.is_fixed:
            pixels = torch.cat((pixels, pixels[-1:].expand(self.input.batch_size - count, -1, -1, -1)))
        if self.input.channels_last:
            pixels = pixels.permute(0, 2, 3, 1)
        batch = np.ascontiguousarray(pixels.numpy()).astype(self.input.dtype)
        scores = np.asarray(self.session.run(None, {self.input.name: batch})[0])
        scores = scores.reshape(len(scores), -1)[:count] if scores.ndim > 1 else scores
        if scores.shape != (count, len(self.labels.names)):
            raise UserError(
                f"{self.path} answers with {list(scores.shape)} for {count} images, but there are "
                f"{len(self.labels.names)} labels: give the labels of this file."
            )
        return scores


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {fault_of(path) or error.strerror}.") from None


def _session(content: bytes, path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError('The judge onnx needs onnxruntime: pip install "erasediff[onnx]".') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    available = onnxruntime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [*(name for name in wanted if name in available), "CPUExecutionProvider"]
    try:
        # From memory, so that the file cannot name others on this machine as its weights.
        return onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # onnxruntime raises a class of its own for each code of its C library.
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{path} cannot be read as ONNX: {reason}.") from error


def _label_lines(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in read_text(path).split("\n")]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"Cannot read the labels in {path}: give a UTF-8 text file of a label a line.") from None
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"There are no labels in {path}: write one per line.")
    return names


def _label_metadata(metadata: Mapping[str, str], path: Path) -> list[str]:
    """Labels in the metadata: a list or a mapping from numbers, in JSON or YAML, or words with commas between them."""
    text = next((metadata[key] for key in LABEL_KEYS if key in metadata), None)
    if text is None:
        raise UserError(f"{path} does not name its labels: give onnx:{path}:LABELS, a text file with one on each line.")
    found = text
    if text.lstrip()[:1] in ("{", "["):
        try:
            found = read_yaml(text)
        except UserError as error:
            raise UserError(f"The labels in the metadata of {path}: it {error}") from None
    match found:
        case dict() if all(str(number) in found for number in range(len(found))):
            return [str(found[str(number)]) for number in range(len(found))]
        case list() if found:
            return [str(name) for name in found]
        case str():
            return [name.strip() for name in text.replace("\n", ",").split(",")]
    raise UserError(f"The labels in the metadata of {path} are not numbered from 0: give onnx:{path}:LABELS.")


def _numbers(text: str | None, default: Sequence[float], path: Path, key: str) -> list[float]:
    if text is None:
        return list(default)
    try:
        values = [float(part) for part in text.strip("[]() ").split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= len(default)
    if len(values) != len(default) or not np.isfinite(values).all() or (key == "std" and min(values) <= 0):
        raise UserError(f'The metadata of {path} has {key} "{text[:60]}": it must be {len(default)} numbers.')
    return values


def _build(argument: str, device: torch.device) -> OnnxJudge:
    if not argument:
        raise UserError("The judge onnx needs a file: give onnx:FILE, or onnx:FILE:LABELS.")
    file, colon, labels = argument.rpartition(":")
    if Path(argument).exists() or not colon:
        return OnnxJudge(Path(argument), None, device)
    return OnnxJudge(Path(file), Path(labels), device)


KIND = JudgeKind("onnx", "onnx:FILE[:LABELS]", _build)
