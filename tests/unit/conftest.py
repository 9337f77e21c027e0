"""Unit tests compile tiny programs that run once or twice: optimising them would take longest."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def _compile_without_optimising():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
