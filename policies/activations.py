"""Sharding of activations while a policy is traced: the trainer sets it, layers apply it.

Parameters are cut over devices, but a policy does not state the sharding of its activations. On its
own XLA then computes some layers by tensor parallelism: it gathers the activations of a whole
micro-batch and waits for their sums, while weights could be gathered ahead (docs/scaling.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax import Array

_place: ContextVar[jax.sharding.Sharding | None] = ContextVar("activations", default=None)


@contextmanager
def activations_at(place: jax.sharding.Sharding | None) -> Iterator[None]:
    """Make `held` keep activations to `place`, a cut of their first axis; None leaves them free."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def held(x: Array) -> Array:
    """Return `x` [B ...] with the trainer's sharding; B must be a multiple of its devices."""
    place = _place.get()
    return x if place is None else jax.lax.with_sharding_constraint(x, place)


def platform() -> str | None:
    """Return the platform of the devices that hold activations, as "cpu"; None if nobody said."""
    place = _place.get()
    return None if place is None else next(iter(place.device_set)).platform
