"""The ranges of numeric settings: every one has one, and one check walks them all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

from sslfast import UserError
from sslfast.evaluate import EvaluateConfig
from sslfast.methods import METHODS, find_method
from sslfast.options import Windows
from sslfast.ranges import Range, check_ranges
from sslfast.training.config import TrainConfig


def numeric_fields(settings: Any) -> Iterator[tuple[str, Any]]:
    """Name and type of each field of a dataclass and of those nested in it that is a number or several."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            yield from numeric_fields(value)
        elif {int, float} & {*parts(hint)}:
            yield name, hint


def parts(hint: Any) -> Iterator[Any]:
    """The types that a type is made of."""
    yield hint
    if get_origin(hint) is not Literal:
        for inner in get_args(hint):
            yield from parts(inner)


@pytest.mark.parametrize(
    "settings",
    [
        TrainConfig("", Path()),
        Windows(),
        EvaluateConfig(Path(), Path()),
        *(find_method(method).Options() for method in METHODS),
    ],
    ids=["training", "windows", "evaluation", *METHODS],
)
def test_every_number_has_a_range_that_its_default_is_in(settings: Any) -> None:
    for name, hint in numeric_fields(settings):
        (limit,) = (data for data in getattr(hint, "__metadata__", ()) if isinstance(data, Range))
        for far in (-1e301, 1e301, -(10**400), 10**400):
            assert limit.fault(far), name
    check_ranges(settings)


@pytest.mark.parametrize(
    ("allowed", "value", "fault"),
    [
        (Range(0, 1), 0, ""),
        (Range(0, 1), 1.5, "0 to 1"),
        (Range(0, below=1), 1, "at least 0 and below 1"),
        (Range(above=0), 0.0, "above 0"),
        (Range(1), (1, 2, 0), "1 or more"),
        (Range(rising=True), (1, 2), ""),
        (Range(rising=True), (2, 2), "rising numbers"),
        (Range(), math.inf, "a finite number"),
        (Range(0), math.nan, "a finite number"),
        (Range(0), "much", "a finite number"),
        (Range(0, 9), 10**400, "0 to 9"),  # larger than any float
    ],
)
def test_a_range_says_what_a_number_must_be(allowed: Range, value: Any, fault: str) -> None:
    assert allowed.fault(value) == fault


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: Annotated[float | None, Range(above=0)] = None


@dataclasses.dataclass(frozen=True)
class Outer:
    colour: Literal["red", "blue"] = "red"
    own_inner: Inner = dataclasses.field(default_factory=Inner)


def test_nested_settings_and_choices_are_checked() -> None:
    check_ranges(Outer())
    with pytest.raises(UserError, match=r"^--rate -1: it must be above 0$"):
        check_ranges(Outer(own_inner=Inner(-1)))
    with pytest.raises(UserError, match=r"^--colour green: it must be one of red, blue$"):
        check_ranges(Outer("green"))  # type: ignore[arg-type]  # what is tested
