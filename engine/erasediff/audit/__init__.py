"""Audit of any checkpoint: whether what should be forgotten can be brought back, and what was damaged on the way."""

from erasediff.audit.batteries import BATTERIES, Battery
from erasediff.audit.context import Audit, GeneralSettings
from erasediff.audit.outcome import BatteryOutcome, Figure
from erasediff.audit.request import Ask, Pictures, Request
from erasediff.audit.subject import Subject

__all__ = [
    "BATTERIES",
    "Ask",
    "Audit",
    "Battery",
    "BatteryOutcome",
    "Figure",
    "GeneralSettings",
    "Pictures",
    "Request",
    "Subject",
]
