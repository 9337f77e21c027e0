import numpy as np

from evac_jax.sim.libero_tasks import Suite

SUITE = Suite("s", tuple("abcdefghij"), (np.zeros((50, 5)),) * 10)


def test_last_tenth_of_the_states_is_held_out_in_every_task():
    starts = np.arange(500)
    held_out = SUITE.is_held_out(starts)
    np.testing.assert_array_equal(held_out, starts >= 450)


def test_starts_are_spread_over_states_with_every_task_in_turn():
    order = SUITE.spread(np.arange(500))
    assert sorted(order) == list(range(500))
    np.testing.assert_array_equal(order % 10, np.arange(500) % 10)
    at = np.flatnonzero(SUITE.is_held_out(order[::10]))
    assert np.diff([-1, *at, 50]).max() <= 13  # no stretch is long without one
    np.testing.assert_array_equal(SUITE.spread(np.arange(3, 17)), [*range(3, 10), *range(10, 17)])
