"""Sharding of activations while a policy is traced: the trainer sets it, layers apply it.

Parameters are sharded over devices, but a policy does not state the sharding of its activations.
Without it XLA computes some layers by tensor parallelism: it gathers the activations of a whole
micro-batch and waits for their sums. Weights, in contrast, can be gathered ahead of their use
(docs/scaling.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax import Array

_place: ContextVar[jax.sharding.Sharding | None] = ContextVar("activations", default=None)


@contextmanager
def activations_at(place: jax.sharding.Sharding | None) -> Iterator[None]:
    """Make `held` apply `place`, a sharding of the first axis; None leaves the choice to XLA."""
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
    """Return the platform of the devices that hold activations, such as "cpu"; None if not set."""
    place = _place.get()
    return None if place is None else next(iter(place.device_set)).platform
