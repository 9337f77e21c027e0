"""Where activations lie while a policy is traced; the trainer says so, layers ask.

Parameters are cut over devices, and nothing in a policy says how what it computes is cut. Left to
itself XLA then multiplies some layers by tensor parallelism: it gathers the activations of a whole
micro-batch and waits for their sums, where weights could be gathered ahead (docs/scaling.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax import Array

_place: ContextVar[jax.sharding.Sharding | None] = ContextVar("activations", default=None)


@contextmanager
def activations_at(place: jax.sharding.Sharding | None) -> Iterator[None]:
    """Let `held` hold activations to `place`, a cut of their first axis; None leaves them free."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def held(x: Array) -> Array:
    """Return `x` [B ...], cut as the trainer says; B must be a multiple of its devices."""
    place = _place.get()
    return x if place is None else jax.lax.with_sharding_constraint(x, place)
