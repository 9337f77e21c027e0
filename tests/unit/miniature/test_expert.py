import numpy as np
import pytest

from evac_jax.miniature import expert, scene
from evac_jax.miniature.expert import Expert, demonstrate


def play(kind, count=64, steps=32, first_seed=0, seed=0):
    scenes = scene.sample_scenes(first_seed + np.arange(count))
    actions, states = demonstrate(scenes, Expert(kind, np.random.default_rng(seed)), steps)
    return actions, states, np.stack([scene.is_success(state) for state in states], 1)


def test_expert_succeeds_everywhere_in_about_23_steps():
    _, _, success = play("expert", 256)
    assert success[:, -1].all()
    assert np.median(success.argmax(1)) == 23


def test_actions_are_within_limits_and_gripper_entries_decided():
    for kind in expert.KINDS:
        actions, _, _ = play(kind, 16)
        assert np.abs(actions).max() <= 1
        assert set(np.unique(actions[..., 6])) <= {-1.0, 1.0}
        assert actions.dtype == np.float32


def test_bad_players_fail_more_often_than_good_ones():
    rates = {kind: play(kind, 128)[2].any(1).mean() for kind in expert.KINDS}
    bad = max(rates["sloppy"], rates["near_miss"])
    assert rates["random"] < bad < 0.5 < rates["noisy"]


def test_sloppy_player_puts_the_block_down_left_of_the_plate():
    _, states, success = play("sloppy", 256)
    off = states[-1].blocks[:, 0, :2] - states[-1].plate
    np.testing.assert_allclose(off.mean(0), (-0.05, 0), atol=0.003)
    assert 0.2 < success.any(1).mean() < 0.4


def test_schedule_reaches_the_block_at_the_end_of_the_first_chunk():
    _, states, _ = play("expert", 64)
    distance = np.linalg.norm(states[8].position - states[8].blocks[:, 0], axis=1)
    assert distance.max() < 0.015


@pytest.mark.parametrize("steps_before", [3, 8, 13, 16, 20])
def test_fresh_expert_finishes_from_the_middle_of_an_episode(steps_before):
    _, states, _ = play("expert", 32, steps_before)
    _, after = demonstrate(states[-1], Expert(), 28)
    assert scene.is_success(after[-1]).all()


def test_fresh_expert_recovers_when_it_holds_the_wrong_block():
    scenes = scene.sample_scenes(np.arange(32))
    scenes.position = scenes.blocks[:, scene.DISTRACTOR].copy()
    scenes.opening[:] = 0
    scenes = scene.step(scenes, np.zeros((32, 7)))
    assert (scenes.held == scene.DISTRACTOR).all()
    _, states = demonstrate(scenes, Expert(), 40)
    assert scene.is_success(states[-1]).mean() > 0.9


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="expert kind"):
        Expert("perfect")
