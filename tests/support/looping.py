"""Many near-equal checks in one test case: thousands of cases cost more than what they check."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

Test = Callable[..., None]


def each(name: str, values: Sequence[object]) -> Callable[[Test], Test]:
    """A parametrisation within one case: the test runs for every value, and fails with all that fail, by name."""

    def decorate(test: Test) -> Test:
        def whole(**arguments: Any) -> None:
            failures = []
            for value in values:
                try:
                    test(**arguments, **{name: value})
                except Exception as failure:
                    failures.append(f"{name} = {value!r}: {type(failure).__name__}: {failure}")
            assert not failures, f"{len(failures)} of {len(values)}:\n" + "\n".join(failures)

        taken = inspect.signature(test)
        whole.__signature__ = taken.replace(  # type: ignore[attr-defined]
            parameters=[parameter for key, parameter in taken.parameters.items() if key != name])
        whole.__name__, whole.__doc__, whole.__module__ = test.__name__, test.__doc__, test.__module__
        whole.pytestmark = list(getattr(test, "pytestmark", []))  # type: ignore[attr-defined]
        whole.loop = (name, values, test)  # type: ignore[attr-defined]
        return whole

    return decorate
