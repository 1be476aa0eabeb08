"""What settings may be, stated by the class that has them: one outside is refused in a sentence when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints


class Checked:
    """A dataclass of settings: a `Literal` is one of its values, an `int` is whole, and one in `limits` lies in its
    interval.

    Intervals are written as in mathematics, "(0, 1]"; an end may be another setting, as in {"low": "(0, inf)", "high":
    "(low, inf)"}. Building one raises ValueError that names the first setting, what it must be and what it is.
    """

    kind: str
    limits: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        own: type = type(self)
        for name, hint in _hints(own).items():
            value, allowed = getattr(self, name), get_args(hint)
            if hint is int and value % 1 != 0:
                raise ValueError(f"{self.kind} {name} must be a whole number, got {value}")
            if allowed and value not in allowed:
                raise ValueError(f"{self.kind} {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        for name, interval in self.limits.items():
            if not self._within(value := getattr(self, name), interval):
                words = "positive" if interval == "(0, inf)" else f"in {interval}"
                raise ValueError(f"{self.kind} {name} must be {words}, got {value}")

    def _within(self, value: float, interval: str) -> bool:
        low, high = (float(getattr(self, end, end)) for end in interval[1:-1].split(", "))
        return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


@cache
def _hints(settings: type) -> dict[str, Any]:
    hints = get_type_hints(settings)
    return {name: hint for name, hint in hints.items() if hint is int or get_origin(hint) is Literal}
