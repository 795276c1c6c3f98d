"""Sample images as small PNG strips, one per class; the browser enlarges their pixels."""

import base64
import io

import torch
from PIL import Image
from torch import Tensor

GAP = 1


def strip(images: Tensor, columns: int) -> str:
    """A data URL: the first ``columns`` of images [N, C, H, W] in a row, places without an image left clear.

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
    """The image as a PNG inside a URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
