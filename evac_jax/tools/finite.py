"""Ends a training whose numbers are no longer finite, before anything of it is stored."""

import math

from evac_jax.errors import TrainingError


def check_finite(step: int, advice: str, **figures: float) -> None:
    """Raise if a figure of a step, such as its loss, is NaN or infinite.

    Args:
        step: counts from 1.
        advice: what the user can do, and what was stored before.
        figures: by name; "_" is told as a space.

    Raises:
        TrainingError: names step, figure and value.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            told = name.replace("_", " ")
            raise TrainingError(f"step {step}: the {told} is {value}. {advice}")
