"""HTML report of a demo: one self-contained file."""

from erasediff.report.contents import Column, Contents
from erasediff.report.render import render

__all__ = ["Column", "Contents", "render"]
