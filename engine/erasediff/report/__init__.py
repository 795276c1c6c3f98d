"""The report that a demo leaves behind: one file to read anywhere."""

from erasediff.report.contents import Column, Contents
from erasediff.report.render import render

__all__ = ["Column", "Contents", "render"]
