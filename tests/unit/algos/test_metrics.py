import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import losses, metrics


def test_mean_counts_covered_entries_when_the_mask_is_broadcast():
    metric = metrics.masked(jnp.ones((2, 3)), jnp.array([[True], [False]]))
    assert (float(metric.sum), float(metric.weight)) == (3.0, 3.0)
    assert metric.mean() == 1.0


def test_mean_is_undefined_when_nothing_is_valid():
    figures = metrics.extremes("x", jnp.ones(2), jnp.zeros(2, bool))
    assert all(jnp.isnan(metric.mean()) for metric in figures.values())


def test_explained_variance_is_that_of_the_whole_when_merged_from_parts():
    rng = np.random.default_rng(0)
    returns = jnp.float32(1000.0 + rng.normal(size=(4, 8)))  # a mean that eats naive float32 sums
    values = returns + jnp.float32(0.5 * rng.normal(size=(4, 8)))
    parts = jax.vmap(lambda v, r: metrics.value_statistics(v, r, None))(values, returns)
    expected = 1.0 - np.var(np.float64(returns) - np.float64(values)) / np.var(np.float64(returns))
    assert float(parts.explained_variance().mean()) == pytest.approx(expected, abs=1e-3)


def test_explained_variance_is_undefined_when_returns_are_constant():
    statistics = metrics.value_statistics(jnp.arange(4.0), jnp.full(4, 0.1), None)
    assert statistics.explained_variance().weight == 0.0


def test_clip_fractions_add_up_when_both_sides_clip():
    surrogate = losses.clipped_surrogate(
        jnp.log(jnp.array([0.5, 2.0, 1.0])),
        jnp.zeros(3),
        jnp.array([-1.0, 1.0, 1.0]),
        clip_low=0.2,
        clip_high=0.2,
    )
    figures = metrics.policy_metrics(surrogate, None)
    sums = [float(figures[f"actor/clip_fraction{s}"].sum) for s in ("", "_low", "_high")]
    assert sums == [2.0, 1.0, 1.0]


def test_value_clip_ratio_counts_moves_when_they_exceed_the_clip():
    metric = metrics.value_clip_ratio(jnp.array([0.0, 1.0]), jnp.zeros(2), None, 0.2)
    assert metric.mean() == 0.5
