"""The figures of LIBERO's benchmark are measured, with a stand-in for the simulator."""

import numpy as np
import pytest

from benchmarks import libero_env
from tests.unit.sim import libero_fakes


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return libero_fakes.write(tmp_path)


def test_actions_are_within_libero_s_range_and_move_the_gripper():
    moves = libero_env.wander(40, 0)
    assert moves.shape == (40, 7)
    assert np.abs(moves[:, :6]).max() <= 0.4
    assert set(moves[:, 6]) == {-1.0, 1.0}
    assert not np.array_equal(moves, libero_env.wander(40, 1))


def test_speed_counts_whole_episodes_after_the_scene_was_built(config, tmp_path):
    per_hour, held, peak = libero_env.speed(config, 2)
    assert per_hour > 0
    assert 0 < held <= peak
    begun, waits = 3, 10 * 3
    assert len(libero_fakes.asked(tmp_path, "seed")) == begun
    played = libero_env.CHUNK + 2 * libero_env.ACTIONS
    assert len(libero_fakes.asked(tmp_path, "step")) == waits + played


def test_episode_that_is_compared_is_not_the_first(config, tmp_path):
    moves = libero_env.wander(5, 0)
    found = libero_env.played(config, 1, moves)
    assert [len(found[name]) for name in ("frames", "poses", "success")] == [6, 6, 5]
    assert [seed for _, seed in libero_fakes.asked(tmp_path, "seed")] == [1, 0]
    np.testing.assert_allclose(found["poses"][-1, :3] - found["poses"][0, :3],
                               0.1 * moves[:, :3].sum(0), atol=1e-6)  # fmt: skip


def test_picture_that_shows_nothing_is_refused(config):
    with pytest.raises(ValueError, match=f"{libero_fakes.TASKS[1]}: its picture shows nothing"):
        libero_env.starts(config, [1])
