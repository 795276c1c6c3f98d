"""Audit of any checkpoint: whether what should be forgotten can be brought back, and what was damaged on the way."""

from erasediff.audit.asks import Ask, Pictures, Request
from erasediff.audit.batteries import BATTERIES, Battery
from erasediff.audit.battery_outcome import BatteryOutcome, Figure
from erasediff.audit.context import Audit, GeneralSettings
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
