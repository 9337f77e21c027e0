import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from algos.types import RolloutBatch
from evac_jax.refill import collect_informative, informative
from evac_jax.rollout import Played

GROUP = 2


class Collector:
    """Hands out batches whose rows are marked by their try and their place."""

    def __init__(self, *success):
        self._success, self.calls = success, 0

    def __call__(self, number):
        assert number == self.calls
        self.calls += 1
        success = np.array(self._success[number], bool)
        marks = jnp.arange(len(success)) + 100 * number
        fields = {f.name: None for f in dataclasses.fields(RolloutBatch)}
        batch = RolloutBatch(**(fields | {"rewards": marks, "tokens": marks}))
        played = Played(np.arange(len(success)), np.zeros((len(success), 1, 1, 1)), success)
        return batch, {"env/success_rate": float(success.mean())}, played


def test_group_teaches_something_when_its_members_differ():
    success = [True, False, True, True, False, False]
    assert informative(success, 2).tolist() == [True, False, False]
    assert informative(success, 3).tolist() == [True, True]


def test_nothing_is_collected_again_when_refill_is_off():
    collector = Collector([1, 1, 0, 0])
    batch, figures, _ = collect_informative(collector, GROUP, 0)
    assert collector.calls == 1
    assert np.asarray(batch.rewards).tolist() == [0, 1, 2, 3]
    assert "env/refills" not in figures


def test_useless_groups_make_room_and_figures_stay_those_of_the_first_collection():
    collector = Collector([1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0], [1, 0] * 3)
    batch, figures, played = collect_informative(collector, GROUP, 5)
    assert collector.calls == 2  # then every group is informative
    assert np.asarray(batch.rewards).tolist() == [2, 3, 100, 101, 104, 105]
    assert np.asarray(batch.tokens).tolist() == np.asarray(batch.rewards).tolist()
    assert figures == {"env/success_rate": pytest.approx(1 / 2), "env/refills": 1.0}
    assert played.success.tolist() == [True, True, True, False, False, False]


def test_tries_are_bounded_and_the_batch_keeps_its_size():
    collector = Collector([1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [1, 0, 1, 0])
    batch, figures, _ = collect_informative(collector, GROUP, 2)
    assert collector.calls == 3
    assert np.asarray(batch.rewards).tolist() == [200, 201, 0, 1]
    assert figures["env/refills"] == 2.0
