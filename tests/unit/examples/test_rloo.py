import jax.numpy as jnp
import numpy as np

from algos import grpo
from evac_jax.config.algorithms import load_algorithm
from examples import rloo
from tests.unit.algos import toy


def test_baseline_of_an_episode_is_the_mean_of_the_others():
    scores = jnp.array([3.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    expected = [3 - 0, 0 - 1.5, 0 - 1.5, 0, 0, 0]
    np.testing.assert_allclose(rloo.leave_one_out(scores, 3), expected)


def test_advantages_stop_at_the_end_of_an_episode_as_in_grpo():
    cfg = grpo.Config(group_size=4, global_batch=8)
    batch = toy.rollout(toy.params(), on_policy=True)
    ours, figures = rloo.advantages(batch, cfg)
    theirs, their_figures = grpo.advantages(batch, cfg)
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    assert figures.keys() == their_figures.keys()
    zero = np.asarray(theirs.advantages) == 0
    assert not zero.all()
    np.testing.assert_array_equal(np.asarray(ours.advantages) == 0, zero)


def test_trainer_finds_all_that_it_asks_for():
    assert load_algorithm("examples.rloo:RLOO") is rloo.RLOO
