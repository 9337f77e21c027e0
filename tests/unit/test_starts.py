from types import SimpleNamespace

import numpy as np
import pytest

from evac_jax.bridge.types import KEYFRAMES
from evac_jax.errors import ConfigError
from evac_jax.starts import StartSampler, noise_seed


def test_members_share_their_start_when_drawn_in_groups():
    ids = StartSampler(10, 40, seed=3, group_size=4).next(3, 8)
    assert ids.dtype == np.int64
    assert ids.shape == (3, 8)
    groups = ids.reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0])) == 6
    assert ((ids >= 10) & (ids < 40)).all()


def test_random_draws_repeat_starts_when_there_are_fewer_than_groups():
    assert set(StartSampler(7, 9).next(1, 20)[0]) == {7, 8}


def test_fixed_order_repeats_itself_and_wraps():
    sampler = StartSampler(4, 7, order="fixed")
    for _ in range(2):
        np.testing.assert_array_equal(sampler.next(2, 2), [[4, 5], [6, 4]])


def test_ordered_draws_go_on_and_wrap():
    sampler = StartSampler(0, 5, order="ordered", group_size=2)
    np.testing.assert_array_equal(sampler.next(1, 6), [[0, 0, 1, 1, 2, 2]])
    np.testing.assert_array_equal(sampler.next(1, 6), [[3, 3, 4, 4, 0, 0]])


@pytest.mark.parametrize("order", ["random", "ordered", "fixed"])
def test_sequence_continues_when_resumed(order):
    one, other = (StartSampler(0, 9, order=order, seed=5) for _ in range(2))
    one.next(2, 4)
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(one.next(2, 4), other.next(2, 4))


def test_random_calls_differ_from_each_other_and_between_seeds():
    sampler = StartSampler(0, 10_000, seed=1)
    first, second = sampler.next(1, 8), sampler.next(1, 8)
    assert (first != second).any()
    assert (first != StartSampler(0, 10_000, seed=2).next(1, 8)).any()
    assert sampler.seed(0) == StartSampler(0, 3, seed=1).seed(0)
    assert len({sampler.seed(i) for i in range(20)}) == 20


def test_resume_is_refused_when_the_range_changed():
    with pytest.raises(ConfigError, match="high: saved 9, configured 8"):
        StartSampler(0, 8).load_state_dict(StartSampler(0, 9).state_dict())


def test_rows_of_broken_groups_are_refused():
    with pytest.raises(ConfigError, match="whole groups of 4"):
        StartSampler(0, 8, group_size=4).next(1, 6)


@pytest.mark.parametrize("arguments", [(3, 3), (-1, 2)])
def test_empty_range_is_refused(arguments):
    with pytest.raises(ConfigError, match="start range"):
        StartSampler(*arguments)


def test_unknown_order_is_refused():
    with pytest.raises(ConfigError, match="ordered"):
        StartSampler(0, 3, order="shuffled")


def config(high):
    env = SimpleNamespace(train_starts=(2, high), start_order="ordered", keyframes=0.0)
    return SimpleNamespace(env=env, seed=0, algo=SimpleNamespace(group_size=2))


def test_the_range_ends_with_the_source_when_left_open():
    sampler = StartSampler.from_config(config(-1), 4)
    np.testing.assert_array_equal(sampler.next(1, 6), [[2, 2, 3, 3, 2, 2]])


def test_a_range_beyond_the_source_is_refused():
    with pytest.raises(ConfigError, match="only 4"):
        StartSampler.from_config(config(5), 4)


def test_share_of_the_groups_begins_at_keyframes_and_repeats_itself():
    def draw():
        sampler = StartSampler(0, 1000, group_size=4, keyframes=(0.25, 7))
        return np.concatenate([sampler.next(1, 400)[0] for _ in range(4)])

    ids = draw()
    np.testing.assert_array_equal(ids, draw())
    groups = ids.reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    late = groups[:, 0] >= KEYFRAMES
    assert 0.15 < late.mean() < 0.35
    assert set(groups[late, 0] - KEYFRAMES) == set(range(7))
    assert groups[~late].max() < 1000


def test_keyframes_that_nobody_offers_are_refused():
    with pytest.raises(ConfigError, match="offer no keyframes"):
        StartSampler(0, 10, keyframes=(0.5, 0))


def test_noise_seeds_of_neighbouring_epochs_and_ranks_never_meet():
    seeds = {noise_seed(noise_seed(7, epoch), rank) for epoch in range(8) for rank in range(8)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**32 for seed in seeds)
