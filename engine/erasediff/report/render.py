"""Rendering of a report as one HTML page."""

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics
from erasediff.evaluation.metrics import Target, conditional_targets, unconditional_targets
from erasediff.report.contents import Column, Contents, class_shares, metric_rows, percent, points
from erasediff.report.figures import QUANTITIES, Recorded, curve, recorded

GAP = 1


def strip(images: Tensor, columns: int) -> str:
    """Row of the first ``columns`` of images [N, C, H, W] as a data URL; missing images are transparent.

    One channel is shown as ink on clear paper (-1 is paper, 1 is ink), so that it suits light and dark pages alike;
    three channels are shown as they are.
    """
    channels = images.shape[1]
    levels = ((images[:columns] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return data_url(row_of_images(255 - levels.expand(-1, 3, -1, -1) if channels == 1 else levels, columns))


def row_of_images(images: Tensor, columns: int) -> Image.Image:
    """Row of the first ``columns`` of images uint8 [N, 3, H, W] in RGBA; missing images are transparent."""
    _, _, height, width = images.shape
    canvas = torch.zeros(4, height, columns * (width + GAP) - GAP, dtype=torch.uint8)
    for column, image in enumerate(images[:columns]):
        left = column * (width + GAP)
        canvas[:, :, left : left + width] = torch.cat([image, torch.full_like(image[:1], 255)])
    return Image.fromarray(canvas.permute(1, 2, 0).numpy(), "RGBA")


def data_url(image: Image.Image, kind: Literal["PNG", "WEBP"] = "PNG") -> str:
    """Data URL of an image: exact as a PNG, with losses as a WebP."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def template_environment() -> Environment:
    """Jinja environment of the templates, with escaping, and errors for undefined names."""
    return Environment(
        loader=PackageLoader("erasediff", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


PICTURE_COLUMNS = 10


def render(contents: Contents) -> str:
    """Render a report as one self-contained HTML page: no network, no script, no other file."""
    environment = template_environment()
    environment.filters |= {"percent": percent, "points": points}
    return environment.get_template("report.html.j2").render(
        contents=contents,
        conditional=isinstance(contents.base.metrics, ConditionalMetrics),
        forgotten=_listed([contents.class_names[c] for c in contents.forget]),
        targets=_targets(contents),
        pictures=[_picture(column, len(contents.class_names)) for column in contents.columns],
        curves=curve_urls(contents.columns[1:]),
        rows=metric_rows(contents),
        shares=[class_shares(column) for column in contents.columns],
    )


def _targets(contents: Contents) -> tuple[Target, ...]:
    base, unlearned = contents.base.metrics, contents.unlearned.metrics
    if isinstance(base, ConditionalMetrics) and isinstance(unlearned, ConditionalMetrics):
        return conditional_targets(unlearned, base)
    if isinstance(base, UnconditionalMetrics) and isinstance(unlearned, UnconditionalMetrics):
        return unconditional_targets(unlearned, base)
    raise ValueError("a report compares conditional models or unconditional ones, not both")


def _picture(column: Column, num_classes: int) -> list[str]:
    """One strip per class."""
    return [strip(column.images[column.rows == c], PICTURE_COLUMNS) for c in range(num_classes)]


def curve_urls(compared: Sequence[Recorded]) -> list[dict[str, Any]]:
    """Curves of each recorded quantity, for light and dark pages."""
    return [
        {
            "title": QUANTITIES[quantity],
            "titles": [column.title for column in columns],
            "light": curve(compared, quantity, dark=False),
            "dark": curve(compared, quantity, dark=True),
        }
        for quantity, columns in recorded(compared).items()
    ]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
