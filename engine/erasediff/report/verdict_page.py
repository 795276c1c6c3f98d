"""Rendering of a run's verdict as one HTML page."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from erasediff.report.figures import Recording
from erasediff.report.render import curve_urls, data_url, row_of_images, template_environment
from erasediff.report.verdict_contents import (
    PictureGroup,
    PictureRow,
    VerdictContents,
    description_text,
    interval_text,
    limit_text,
    value_text,
)

PICTURE_COLUMNS = 8
LARGEST_SIDE = 160
"""Pixels of a picture's height on the page; larger ones are scaled down, and smooth."""
MARKS = {"passed": ("✓", "Passed"), "failed": ("✗", "Failed"), "undecided": ("?", "Undecided")}


def render_verdict(contents: VerdictContents) -> str:
    """Render the report of a run as one self-contained HTML page: no network, no script, no other file."""
    environment = template_environment()
    environment.filters |= {
        "value": value_text,
        "interval": interval_text,
        "limit": limit_text,
        "description": description_text,
    }
    icon, label = MARKS[contents.outcome]
    run = Recording(title="", records=contents.records)
    return environment.get_template("verdict.html.j2").render(
        contents=contents,
        icon=icon,
        label=label,
        groups=[_group(group) for group in contents.pictures if group.rows],
        curves=curve_urls([run]),
    )


def _group(group: PictureGroup) -> dict[str, Any]:
    columns = min(PICTURE_COLUMNS, max(len(images) for row in group.rows for images in (row.before, row.after)))
    return {"title": group.title, "note": group.note, "rows": [_row(row, max(columns, 1)) for row in group.rows]}


def _row(row: PictureRow, columns: int) -> dict[str, Any]:
    strips = [(name, _strip(images, columns)) for name, images in (("before", row.before), ("after", row.after))]
    return {"label": row.label, "strips": strips, "is_smooth": row.before.shape[2] > LARGEST_SIDE}


def _strip(images: Tensor, columns: int) -> str:
    """Data URL of the first images uint8 [N, 3, H, W] in a row: photographs with losses, small pictures exact."""
    count, _, height, width = images.shape
    if height <= LARGEST_SIDE or not count:
        return data_url(row_of_images(images, columns))
    size = (LARGEST_SIDE, max(1, round(width * LARGEST_SIDE / height)))
    shown = interpolate(images[:columns].float(), size, mode="bicubic", antialias=True)
    return data_url(row_of_images(shown.round().clamp(0, 255).to(torch.uint8), columns), "WEBP")
