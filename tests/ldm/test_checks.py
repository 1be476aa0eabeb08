"""Settings outside of what their class states are refused, in a sentence that names them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import pytest

from ldm.checks import Checked
from ldm.grids import GRIDS
from ldm.guidance import GUIDANCES
from ldm.predictions import PREDICTIONS
from ldm.samplers import SAMPLERS
from ldm.schedules import SCHEDULES
from ldm.times import TIMES
from ldm.weighting import WEIGHTINGS

FAMILIES = (*GRIDS, *GUIDANCES, *PREDICTIONS, *SAMPLERS, *SCHEDULES, *TIMES, *WEIGHTINGS)
LIMITED = [(cls, field.name) for cls in FAMILIES for field in fields(cls) if field.name in cls.limits]


@dataclass(frozen=True, kw_only=True)
class Example(Checked):
    limits: ClassVar = {"open": "(0, 1)", "closed": "[0, 1]", "low": "[-1, high)", "high": "(0, inf)"}
    kind: Literal["example"] = "example"
    open: float = 0.5
    closed: float = 0.5
    low: float = 0.0
    high: float = 1.0
    count: int = 1
    mode: Literal["a", "b"] = "a"


@pytest.mark.parametrize("settings", [{"open": 1e-300}, {"open": 1 - 1e-16}, {"closed": 0}, {"closed": 1}, {"low": -1},
                                      {"low": 1.5, "high": 2}, {"high": 1e300}, {"count": -7}, {"mode": "b"}], ids=str)
def test_what_is_inside_is_taken(settings: dict[str, Any]) -> None:
    assert all(getattr(Example(**settings), name) == value for name, value in settings.items())


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"open": 0}, "example open must be in (0, 1), got 0"),
    ({"open": 1.0}, "example open must be in (0, 1), got 1.0"),
    ({"closed": -1e-9}, "example closed must be in [0, 1], got -1e-09"),
    ({"closed": 1.1}, "example closed must be in [0, 1], got 1.1"),
    ({"closed": math.nan}, "example closed must be in [0, 1], got nan"),
    ({"low": 1.0}, "example low must be in [-1, high), got 1.0"),
    ({"low": -2}, "example low must be in [-1, high), got -2"),
    ({"high": math.inf}, "example high must be positive, got inf"),
    ({"count": 1.5}, "example count must be a whole number, got 1.5"),
    ({"count": math.inf}, "example count must be a whole number, got inf"),
    ({"mode": "c"}, "example mode must be one of a, b, got 'c'"),
    ({"kind": "other"}, "example kind"),
], ids=str)
def test_what_is_outside_is_refused_by_name(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        Example(**settings)
    assert str(refused.value).startswith(sentence.replace("example kind", "other kind must be one of example"))


@pytest.mark.parametrize(("cls", "name"), LIMITED, ids=lambda value: getattr(value, "kind", value))
def test_every_kind_keeps_the_limits_it_states(cls: type, name: str) -> None:
    interval: str = cls.limits[name]  # type: ignore[attr-defined]
    low, high = interval[1:-1].split(", ")
    ends = [float(getattr(cls, end, end)) for end, open_ in ((low, interval[0] == "("), (high, interval[-1] == ")"))
            if open_]
    for value in [-math.inf, math.nan, *ends]:
        with pytest.raises(ValueError, match="must be"):
            replace(cls(), **{name: value})
