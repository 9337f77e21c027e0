"""Recording LIBERO with scripts; a stand-in for the simulator (`libero_fakes`)."""

import dataclasses

import numpy as np
import pytest

from evac_jax.config.build import default_config
from evac_jax.config.schema import PolicyConfig
from evac_jax.errors import CheckpointError, ConfigError, DataError
from evac_jax.files import recordings
from evac_jax.sim.libero_players import LiberoPlayer, scripted_tasks
from evac_jax.sim.libero_pool import LiberoPool
from evac_jax.tools.episodes import collect, collect_libero
from tests.unit import policy_folder
from tests.unit.sim import libero_fakes


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two tasks x 20 states, of which the first task is a pick-and-place."""
    for name, value in libero_fakes.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    libero = libero_fakes.write(tmp_path)
    states = [np.array([[0, 0.01 * n, y, 0.5, 7] for n in range(20)]) for y in (0.3, 0.6)]
    libero_fakes.write_states(libero, states)
    plain = default_config("grpo")
    return dataclasses.replace(
        plain,
        libero=libero,
        env=dataclasses.replace(plain.env, train_starts=(0, -1)),
        eval=dataclasses.replace(plain.eval, ground_truth="libero", ground_truth_envs=2),
    )


def run(config, out, **collect_fields):
    wanted = dataclasses.replace(config.collect, out=str(out), **collect_fields)
    collect.run(dataclasses.replace(config, collect=wanted))
    return recordings.load(out)


@pytest.mark.parametrize("repeat", [1, 2])
def test_scripts_decide_before_every_action_from_where_things_are(config, tmp_path, repeat):
    libero = dataclasses.replace(config.libero, action_repeat=repeat)
    config = dataclasses.replace(config, libero=libero)
    data = run(config, tmp_path / "out", episodes=4, mix="expert=0.5,random=0.5")
    assert data.sources == ("expert", "random")
    assert data.task.tolist()[:2] == [0, 0]  # scripts close no drawer
    assert set(data.task.tolist()[2:]) == {0, 1}
    pool = LiberoPool(config.libero, 1)
    try:
        task = scripted_tasks(pool.bddl_files, pool.suite)[0]
        player = LiberoPlayer("expert", task, np.random.default_rng(0), repeat=repeat)
        pose = pool.start([0], data.start[:1])[1][0]
        for t in range(data.length[0]):
            action = player.act(pose, pool.look([0])[0])
            np.testing.assert_array_equal(data.actions[t], action)
            pose = pool.play([0], [action[None]], [False])[0].poses[-1]
            np.testing.assert_array_equal(data.poses[t + 1], pose)
    finally:
        pool.close()


def test_where_things_are_is_recorded_for_every_player(config, tmp_path):
    data = run(config, tmp_path / "out", episodes=4, mix="expert=0.5,random=0.5")
    there = data.objects.reshape(data.num_episodes, -1, 3, 3)
    random = np.repeat(data.source == data.sources.index("random"), data.length + 1)
    known = np.isfinite(data.intended[:, 0])
    assert known.sum() == data.length[data.source != data.sources.index("random")].sum()
    assert not known[random].any()
    np.testing.assert_array_equal(data.lessons, data.actions)  # the expert has no noise
    for task, places in zip(data.task, there, strict=True):
        if task == 0:
            np.testing.assert_array_equal(places[:, 0] - np.float32(libero_fakes.BOWL), 0)
            np.testing.assert_array_equal(places[:, 1] - np.float32(libero_fakes.PLATE), 0)
        else:  # a drawer to close: nothing is moved
            assert np.isnan(places).all()
        assert np.isnan(places[:, 2]).all()  # there is one bowl


def test_each_player_plays_task_by_task_as_a_scene_takes_long_to_build(config, tmp_path):
    eval_config = dataclasses.replace(config.eval, ground_truth_envs=1)
    data = run(
        dataclasses.replace(config, eval=eval_config),
        tmp_path / "out",
        episodes=12,
        mix="random=1",
    )
    assert data.task.tolist() == [0] * 6 + [1] * 6
    assert len(set(data.start.tolist())) == 12


def test_next_seed_goes_on_with_other_starts(config, tmp_path):
    parts = [
        run(
            dataclasses.replace(config, seed=seed),
            tmp_path / str(seed),
            episodes=12,
            mix="random=1",
        )
        for seed in range(3)
    ]
    assert len({start for part in parts for start in part.start.tolist()}) == 36  # of 40


def test_split_is_by_initial_state_for_every_player(config, tmp_path):
    data = run(config, tmp_path / "out", episodes=60, mix="midway=0.5,random=0.5")
    np.testing.assert_array_equal(data.held_out, data.start // 2 >= 18)
    for source in range(2):
        assert data.held_out[data.source == source].any()


def test_same_seed_gives_the_same_recording(config, tmp_path):
    mix = "noisy=0.4,near_miss=0.2,sloppy=0.2,midway=0.2"
    one, two = (run(config, tmp_path / name, episodes=6, mix=mix) for name in "ab")
    assert one.card["sha256"] == two.card["sha256"]


def test_player_that_does_not_exist_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"expert, noisy, sloppy, near_miss, midway, random"):
        run(config, tmp_path / "out", mix="perfect=1")


def test_prompt_that_is_too_long_is_refused_before_libero_starts(config, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_libero, "LiberoPool", None)
    folder = policy_folder.write(tmp_path / "policy")
    policy = PolicyConfig(checkpoint=str(folder), unnorm_key="tiny", max_prompt_length=8)
    with pytest.raises(CheckpointError, match=r"raise policy\.max_prompt_length"):
        run(dataclasses.replace(config, policy=policy), tmp_path / "out", mix="policy=1")


def test_policy_of_another_gripper_is_refused_before_libero_starts(config, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_libero, "LiberoPool", None)
    folder = policy_folder.write(tmp_path / "policy")
    (folder / "card.json").write_text('{"gripper": "none"}')
    policy = PolicyConfig(checkpoint=str(folder), unnorm_key="tiny")
    with pytest.raises(ConfigError, match=r"env\.gripper: expected gripper 'none'"):
        run(dataclasses.replace(config, policy=policy), tmp_path / "out", mix="policy=1")


def test_starts_without_a_task_for_scripts_are_refused(config, tmp_path):
    env = dataclasses.replace(config.env, train_starts=(1, 2))
    with pytest.raises(ConfigError, match=r"train_starts: expert can do no task"):
        run(dataclasses.replace(config, env=env), tmp_path / "out", mix="expert=1", episodes=2)


@pytest.fixture
def nobody_plays(monkeypatch):
    monkeypatch.setattr(collect_libero, "play_batch", lambda *_, **__: pytest.fail("played"))


def test_last_player_is_checked_before_the_first_plays(config, tmp_path, nobody_plays):
    env = dataclasses.replace(config.env, train_starts=(1, 2))
    with pytest.raises(ConfigError, match=r"train_starts: expert can do no task"):
        run(
            dataclasses.replace(config, env=env),
            tmp_path / "out",
            mix="random=0.5,expert=0.5",
            episodes=2,
        )
    with pytest.raises(CheckpointError, match="cannot import '/missing'"):
        run(config, tmp_path / "out", mix="expert=0.5,policy:/missing@1=0.5", episodes=2)
    assert not (tmp_path / "out").exists()


def test_policy_of_other_actions_is_refused_before_anyone_plays(config, tmp_path, nobody_plays):
    folder = policy_folder.write(tmp_path / "policy")
    policy = dataclasses.replace(config.policy, unnorm_key="tiny", max_prompt_length=128)
    with pytest.raises(ConfigError, match="expected statistics of 7 numbers, .*got 3 of 'tiny'"):
        run(
            dataclasses.replace(config, policy=policy),
            tmp_path / "out",
            mix=f"expert=0.5,policy:{folder}@1=0.5",
            episodes=2,
        )


@pytest.mark.parametrize("camera", ["true", "reference"])
def test_cameras_of_all_tasks_are_looked_at_before_anyone_plays(
    config, tmp_path, monkeypatch, camera
):
    begin = LiberoPool.start

    def start(pool, envs, starts):
        answer = begin(pool, envs, starts)
        pool.one_camera &= camera == "reference" or 1 not in pool.suite.locate(starts)[0]
        return answer

    def play(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LiberoPool, "start", start)
    monkeypatch.setattr(collect_libero, "play_batch", play)
    libero = dataclasses.replace(config.libero, camera=camera)
    eval_config = dataclasses.replace(config.eval, ground_truth_envs=1)
    config = dataclasses.replace(config, libero=libero, eval=eval_config)
    differ = pytest.raises(DataError, match="cameras in several places")
    with differ if camera == "true" else pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "out", mix="random=1", episodes=4)
