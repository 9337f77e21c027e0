"""Tasks are known by their texts; their numbers mean something within one list only."""

from collections.abc import Sequence

import numpy as np

from evac_jax.errors import ConfigError, nearest


def numbers_in(known: Sequence[str], wanted: Sequence[str], what: str) -> np.ndarray:
    """Return where each text of `wanted` stands in `known`, int32 [len(wanted)].

    Args:
        known: a list of instructions; of equal ones the first counts.
        wanted: instructions, in any order; a part of `known` is enough.
        what: whose list `known` is, for the message.

    Raises:
        ConfigError: names every text that is not in `known`.
    """
    if unknown := sorted(set(wanted) - set(known)):
        told = "\n".join(f"  {text!r}.{nearest(text, known)}" for text in unknown)
        raise ConfigError(f"{what} knows the instructions {list(known)}; unknown to it are\n{told}")
    place = {text: number for number, text in reversed(list(enumerate(known)))}
    return np.array([place[text] for text in wanted], np.int32)
