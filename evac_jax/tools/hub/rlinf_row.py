"""One row of the table of RLinf's keys: what a key is here, and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAPPED, NO_MEANING = "mapped", "without meaning here"
DIFFERENT, UNSUPPORTED = "different here", "not supported"
ANY: Any = object()
# (value of the key, all values by path) -> fields of our configuration. A value that has no
# counterpart raises ValueError, which says why.
Convert = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class To:
    """The conversion that copies a value to a field of our configuration."""

    field: str

    def __call__(self, value: Any, _values: Mapping[str, Any]) -> dict[str, Any]:
        """Convert."""
        return {self.field: value}


def _nothing(_value: Any, _values: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Row:
    """What a key is here.

    Attributes:
        verdict: MAPPED, NO_MEANING or DIFFERENT.
        reason: why; for DIFFERENT also which switch brings RLinf's numbers back.
        convert: the fields that the value sets.
        only: values for which this holds, any other is not supported; ANY = all.
        absent: value that RLinf uses where the key is missing; ANY = the key then sets nothing.
    """

    verdict: str
    reason: str
    convert: Convert = _nothing
    only: Any = ANY
    absent: Any = ANY
