"""What cards tell of LIBERO: how its frames were drawn and how often each action was played.

A policy belongs to the frames and the pace that it was trained on. Recordings and policies carry
`LiberoConfig.facts()` in their cards under "libero".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evac_jax.errors import DataError

# Frames and actions mean something else where one of these differs.
ALIKE = ("image_size", "crop", "oversample", "reflections", "action_repeat")
# A start id is of another task and state where one of these differs.
NUMBERING = ("suite", "tasks", "extra_states")


def told(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card tells of LIBERO, or the card of what it started from; {} = nothing."""
    one: Any = card
    while isinstance(one, Mapping):
        if one.get("libero"):
            return dict(one["libero"])
        one = one.get("start")
    return {}


def common(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the cards of several recordings tell alike.

    Raises:
        DataError: frames or actions of one mean something else.
    """
    first, *others = map(told, cards)
    for other in others:
        if unlike := differences(first, other):
            raise DataError(f"recordings of LIBERO differ in {unlike}; record both alike")
    return {key: first[key] for key in first if all(o.get(key) == first[key] for o in others)}


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str] = ALIKE
) -> str:
    """Return the entries `names` that differ, in words; "" = none."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    pairs = {name: (plain(one.get(name)), plain(other.get(name))) for name in names}
    return ", ".join(f"{name} ({a} and {b})" for name, (a, b) in pairs.items() if a != b)
