"""Bounds of a number, as part of its type: `Annotated[float, Range(0, 1)]`.

Standard library only. The module is in the lowest package because algorithms, configuration and
simulators all declare settings with it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`.

    Attributes:
        low: smallest number; None = no bound.
        high: largest number; None = no bound.
        open: "low", "high" or "both": which bounds are excluded from the range.
    """

    low: float | None = None
    high: float | None = None
    open: Literal["", "low", "high", "both"] = ""

    def __contains__(self, value: float) -> bool:
        """Whether a number is allowed; NaN is never allowed."""
        above = self.low is None or value > self.low or (value == self.low and not self._open_low)
        below = self.high is None or value < self.high or (
            value == self.high and not self._open_high
        )  # fmt: skip
        return above and below and value == value

    def __str__(self) -> str:
        """The bounds in words, as in messages and on the reference page."""
        if self.low is None and self.high is None:
            return "any number"
        if self.high is None:
            return f"> {self.low}" if self._open_low else f"at least {self.low}"
        if self.low is None:
            return f"< {self.high}" if self._open_high else f"at most {self.high}"
        if not self.open:
            return f"{self.low}..{self.high}"
        left, right = "(" if self._open_low else "[", ")" if self._open_high else "]"
        return f"a number in {left}{self.low}, {self.high}{right}"

    @property
    def _open_low(self) -> bool:
        return self.open in ("low", "both")

    @property
    def _open_high(self) -> bool:
        return self.open in ("high", "both")


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, open="low")]
NotNegative = Annotated[float, Range(0)]
