"""Rendering of a report as one HTML page."""

import base64
import io
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics
from erasediff.evaluation.metrics import Target, conditional_targets, unconditional_targets
from erasediff.report.contents import Column, Contents, class_shares, metric_rows, percent, points
from erasediff.report.figures import QUANTITIES, curve, recorded

GAP = 1


def strip(images: Tensor, columns: int) -> str:
    """Row of the first ``columns`` of images [N, C, H, W] as a data URL; missing images are transparent.

    One channel is shown as ink on clear paper (-1 is paper, 1 is ink), so that it suits light and dark pages alike;
    three channels are shown as they are.
    """
    _, channels, height, width = images.shape
    canvas = torch.zeros(4, height, columns * (width + GAP) - GAP, dtype=torch.uint8)
    for column, image in enumerate(images[:columns]):
        levels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        left = column * (width + GAP)
        ink = torch.cat([255 - levels.expand(3, -1, -1) if channels == 1 else levels, torch.full_like(levels[:1], 255)])
        canvas[:, :, left : left + width] = ink
    return data_url(Image.fromarray(canvas.permute(1, 2, 0).numpy(), "RGBA"))


def data_url(image: Image.Image) -> str:
    """Data URL of an image as a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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
        curves=_curves(contents),
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


def _curves(contents: Contents) -> list[dict[str, Any]]:
    compared = contents.columns[1:]
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
