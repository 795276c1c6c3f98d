"""Field types and the base class of configuration sections."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_COUNT = 2**31 - 1
Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Threads = Annotated[int, Field(gt=0, le=1024)]
"""Threads of a CPU; for a billion of them OpenMP ends the process without a word to Python."""
Bytes = Annotated[int, Field(gt=0, lt=2**63)]
Side = Annotated[int, Field(gt=0, le=16_384)]
"""Side of an image in pixels."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def _class_reference(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PydanticCustomError("class_reference", "Input should be the number or the name of a class")
    if isinstance(value, int) and value < 0:
        raise PydanticCustomError("class_reference", "Input should be greater than or equal to 0")
    return value


ClassReference = Annotated[Any, BeforeValidator(_class_reference)]
"""A class by its number, or by its name until a job knows the data."""


class Section(BaseModel):
    """Base class of configuration sections; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
