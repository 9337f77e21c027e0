import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from algos import grpo
from algos.refill import collect_informative, informative
from algos.types import RolloutBatch
from evac_jax.rollout import Played

ALGO = grpo.Config(group_size=2)


def _batch(success, number=0):
    """One-action episodes whose tokens tell their try and their place."""
    rewards = jnp.asarray(success, float)[:, None, None]
    fields = {field.name: None for field in dataclasses.fields(RolloutBatch)} | {
        "rewards": rewards,
        "terminated": rewards > 0,
        "truncated": jnp.ones_like(rewards, bool),
        "tokens": jnp.arange(len(rewards)) + 100 * number,
    }
    return RolloutBatch(**fields)


class Collector:
    """Hands out one batch after the other."""

    def __init__(self, *success):
        self._success, self.calls = success, 0

    def __call__(self, number):
        assert number == self.calls
        self.calls += 1
        success = np.array(self._success[number], bool)
        played = Played(np.arange(len(success)), np.zeros((len(success), 1, 1, 1)), success)
        figures = {"env/success_rate": float(success.mean())}
        return _batch(success, number), figures, played


def _tokens(batch):
    return np.asarray(batch.tokens).tolist()


def test_group_teaches_something_when_its_members_differ():
    batch = _batch([1, 0, 1, 1, 0, 0])
    assert informative(batch, ALGO).tolist() == [True, False, False]
    assert informative(batch, dataclasses.replace(ALGO, group_size=3)).tolist() == [True, True]


def test_group_that_the_reward_filter_drops_teaches_nothing():
    algo = dataclasses.replace(ALGO, group_size=4, filter_rewards=True, filter_low=0.3)
    batch = _batch([1, 0, 0, 0, 1, 1, 0, 0])
    assert informative(batch, algo).tolist() == [False, True]


def test_nothing_is_collected_again_when_refill_is_off():
    collector = Collector([1, 1, 0, 0])
    batch, figures, _ = collect_informative(collector, ALGO, 0)
    assert collector.calls == 1
    assert _tokens(batch) == [0, 1, 2, 3]
    assert list(figures) == ["env/success_rate"]


def test_nothing_is_collected_again_when_every_group_teaches():
    collector = Collector([1, 0, 0, 1])
    batch, figures, _ = collect_informative(collector, ALGO, 3)
    assert collector.calls == 1
    assert _tokens(batch) == [0, 1, 2, 3]
    assert (figures["rollout/refills"], figures["rollout/kept_groups"]) == (0, 2)


def test_useless_groups_make_room_and_figures_stay_those_of_the_first_collection():
    collector = Collector([1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0], [1, 0] * 3)
    batch, figures, played = collect_informative(collector, ALGO, 5)
    assert collector.calls == 2  # then every group is informative
    assert _tokens(batch) == [2, 3, 100, 101, 104, 105]
    assert np.asarray(batch.rewards[:, 0, 0]).tolist() == [1, 0, 0, 1, 1, 0]
    assert figures == {
        "env/success_rate": pytest.approx(1 / 2),
        "rollout/refills": 1.0,
        "rollout/kept_groups": 3.0,
    }
    assert played.success.tolist() == [True, True, True, False, False, False]


def test_tries_are_bounded_and_the_batch_keeps_its_size():
    collector = Collector([1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [1, 0, 1, 0])
    batch, figures, _ = collect_informative(collector, ALGO, 2)
    assert collector.calls == 3
    assert _tokens(batch) == [200, 201, 0, 1]
    assert (figures["rollout/refills"], figures["rollout/kept_groups"]) == (2, 1)
