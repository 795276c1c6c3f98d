"""Figures as files of their own, and within pages."""

import base64
import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from erasediff.runs.atomic import atomic_file

WITHOUT_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def save_figure(figure: Figure, path: Path) -> None:
    """Of the kind that the name says, in bytes that change only with what is shown. UserError for a disk's refusal."""
    with atomic_file(path) as partial, rc_context({"svg.hashsalt": path.name}):
        figure.savefig(partial, format=path.suffix.removeprefix("."), metadata=WITHOUT_DATE.get(path.suffix))


def figure_url(figure: Figure) -> str:
    """As a PNG with a clear background, inside a URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
