"""Ranges of numeric settings, declared beside each field and checked by one function."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sslfast.errors import UserError

COUNT = 10**9  # the most of anything that is counted


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that a field may hold: `rate: Annotated[float, Range(0, below=1)]`. NaN and infinity are never allowed.

    Args:
        least, most: smallest and largest value.
        above, below: the same, but the value itself is not allowed.
        rising: each number of a tuple must be larger than the one before.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    rising: bool = False

    def fault(self, value: Any) -> str:
        """What a number, or the numbers of a tuple, must be; empty if they are."""
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if not all(isinstance(x, (int, float)) and -math.inf < x < math.inf for x in numbers):
            return "a finite number"
        inside = all(self.least <= x <= self.most and self.above < x < self.below for x in numbers)
        if not inside:
            return self.describe()
        pairs = zip(numbers, numbers[1:], strict=False)
        return "" if not self.rising or all(x < y for x, y in pairs) else "rising numbers"

    def describe(self) -> str:
        """The range in words."""
        if self.above == -math.inf == -self.below and self.least > -math.inf:
            return f"{self.least:,} or more" if self.most == math.inf else f"{self.least:,} to {self.most:,}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if math.isfinite(bound))


def check_ranges(settings: Any) -> None:
    """Checks every field of a dataclass, and of those nested in it, that has a `Range` or is a choice of names.

    Raises:
        UserError: names the flag, its value and what it must be.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        several = get_origin(hint) is tuple
        choice = get_args(hint)[0] if several else hint
        if get_origin(choice) is Literal and not {*(value if several else [value])} <= {*get_args(choice)}:
            _refuse(field.name, value, f"one of {', '.join(map(str, get_args(choice)))}")
        for limit in getattr(hint, "__metadata__", ()):
            if isinstance(limit, Range) and value is not None and limit.fault(value):
                _refuse(field.name, value, limit.fault(value))


def _refuse(name: str, value: Any, wanted: str) -> None:
    shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
    raise UserError(f"--{name.replace('_', '-')} {shown}: it must be {wanted}")
