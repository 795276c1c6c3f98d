"""HTML reports of a demo and of a run's verdict: each one self-contained file."""

from erasediff.report.contents import Column, Contents
from erasediff.report.render import render
from erasediff.report.verdict_contents import FigureRow, JudgeRow, PictureGroup, PictureRow, VerdictContents
from erasediff.report.verdict_page import render_verdict

__all__ = [
    "Column",
    "Contents",
    "FigureRow",
    "JudgeRow",
    "PictureGroup",
    "PictureRow",
    "VerdictContents",
    "render",
    "render_verdict",
]
