"""Each test compiles a handful of tiny programs once; optimising them would be most of the time."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def fast_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
