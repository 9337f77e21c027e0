import dataclasses

import numpy as np
import pytest

from configs import grpo
from evac_jax import train
from evac_jax.bridge.types import KEYFRAMES
from evac_jax.config.build import default_config, from_config_dict
from evac_jax.errors import ConfigError
from evac_jax.files import cards, start_frames
from evac_jax.starts import (
    StartSampler,
    check_ranges,
    ground_truth_range,
    ids_in_ground_truth,
    noise_seed,
    range_of,
)


def replayed(folder, truth="libero", **changes):
    """A configuration whose starts are the packed frames of `folder`; LIBERO need not be there."""
    env = {"initial_states": "npy", "initial_states_path": str(folder), "train_starts": (0, 3)}
    config = default_config("grpo")
    return dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, **env | changes),
        eval=dataclasses.replace(config.eval, ground_truth=truth, twin_fraction=0.5),
        libero=dataclasses.replace(config.libero, suite="libero_goal", tasks=(1, 4)),
    )


def pack(folder, states, **libero):
    libero = {"suite": "libero_goal", "tasks": [1, 4], "extra_states": False} | libero
    cards.write_json(folder / "card.json", {"states": states, "libero": libero})
    for name in (start_frames.IMAGES_FILE, start_frames.TASKS_FILE):
        np.save(folder / name, np.zeros(4, np.int32))


def test_packed_starts_tell_their_ids_in_the_ground_truth(tmp_path):
    pack(tmp_path, [200, 203, 201, -1])
    assert ids_in_ground_truth(replayed(tmp_path)).tolist() == [200, 203, 201, -1]
    assert ids_in_ground_truth(replayed(tmp_path, initial_states="libero")) is None


def test_starts_whose_ids_in_the_ground_truth_nobody_knows_are_refused(tmp_path):
    unknown = "config.eval.twin_fraction: .* does not tell of which"
    with pytest.raises(ConfigError, match=unknown):
        ids_in_ground_truth(replayed(tmp_path))
    pack(tmp_path, [200, 203, 201, -1])
    with pytest.raises(ConfigError, match=unknown):
        ids_in_ground_truth(replayed(tmp_path, train_starts=(0, -1)))
    pack(tmp_path, [200, 203, 201])  # of four frames
    with pytest.raises(ConfigError, match=unknown):
        ids_in_ground_truth(replayed(tmp_path))


def test_starts_of_a_libero_that_numbers_otherwise_are_refused(tmp_path):
    pack(tmp_path, [200, 203, 201, 1], tasks=[1, 3])
    with pytest.raises(ConfigError, match=r"config.libero, .*: tasks \(\[1, 3\] and \[1, 4\]\)"):
        ids_in_ground_truth(replayed(tmp_path))


def test_states_of_another_simulator_are_refused(tmp_path):
    pack(tmp_path, [200, 203, 201, 1])
    with pytest.raises(ConfigError, match=r"suite \(libero_goal and None\)"):
        ids_in_ground_truth(replayed(tmp_path, truth="my_package.my_module:make"))
    card = {"states": [0, 1, 2, 3]}
    cards.write_json(tmp_path / "card.json", card)
    with pytest.raises(ConfigError, match=r"suite \(None and libero_goal\)"):
        ids_in_ground_truth(replayed(tmp_path))


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
    base = default_config("grpo")
    env = dataclasses.replace(base.env, train_starts=(2, high), start_order="ordered")
    return dataclasses.replace(base, env=env, algo=dataclasses.replace(base.algo, group_size=2))


def test_the_range_ends_with_the_source_when_left_open():
    sampler = StartSampler.from_config(config(-1), 4)
    np.testing.assert_array_equal(sampler.next(1, 6), [[2, 2, 3, 3, 2, 2]])


def test_a_range_beyond_the_source_is_refused():
    with pytest.raises(ConfigError, match=r"train_starts: .* the 4 starts of .*got \(2, 5\)"):
        StartSampler.from_config(config(5), 4)


@pytest.mark.parametrize("ends", [(4, -1), (1, 5), (3, 3), (-1, 2)])
def test_range_with_starts_that_do_not_exist_is_refused(ends):
    with pytest.raises(ConfigError, match=r"eval\.starts: .* 4 starts of S, .*\"\(0, -1\)\""):
        range_of("eval.starts", ends, 4, "S")


def test_range_ends_where_the_starts_end_when_left_open():
    assert range_of("eval.starts", (1, -1), 4, "S") == (1, 4)
    assert range_of("eval.starts", (0, 4), 4, "S") == (0, 4)


@pytest.fixture
def from_a_folder(tmp_path):
    """The miniature's preset with three start frames of one's own."""
    for n in range(3):
        (tmp_path / f"{n}.npy").touch()
    values = grpo.get_config().to_dict()
    values["env"] |= {"initial_states": "npy", "initial_states_path": str(tmp_path)}
    return values


def test_ranges_of_a_preset_are_refused_together_when_a_folder_has_fewer_starts(from_a_folder):
    config = from_config_dict(from_a_folder)
    with pytest.raises(ConfigError, match=r"(?s)env\.train_starts: .*eval\.starts: ") as error:
        check_ranges(config, learning=True)
    assert str(error.value).count("the 3 starts of env.initial_states='npy' in ") == 2
    with pytest.raises(ConfigError) as error:
        check_ranges(config, learning=False)
    assert "train_starts" not in str(error.value)
    from_a_folder["env"]["train_starts"], from_a_folder["eval"]["starts"] = (0, 2), (2, -1)
    check_ranges(from_config_dict(from_a_folder), learning=True)


def test_nothing_is_started_when_a_range_does_not_exist(from_a_folder):
    from_a_folder["policy"]["checkpoint"] = from_a_folder["env"]["initial_states_path"]  # no policy
    with pytest.raises(ConfigError, match="the 3 starts"):
        train._ready(from_config_dict(from_a_folder), None).__enter__()


def test_ground_truth_starts_are_its_own_unless_the_ids_mean_the_same(from_a_folder):
    def starts(**settings):
        for name, value in settings.items():
            section, key = name.split("__")
            from_a_folder[section][key] = value
        return ground_truth_range(from_config_dict(from_a_folder))

    assert starts() == ("eval.ground_truth_starts", (0, -1))
    assert starts(env__initial_states="miniature") == ("eval.starts", (1_000_000, 2_000_000))
    name = "eval.ground_truth_starts"
    assert starts(eval__ground_truth_starts=(3, 9)) == (name, (3, 9))
    learned_in = {"env__simulator": "ground_truth", "env__initial_states": "npy"}
    found = starts(eval__ground_truth_starts=(), eval__episodes=0, **learned_in)
    assert found == ("eval.starts", (1_000_000, 2_000_000))


def test_range_of_one_number_is_refused(from_a_folder):
    from_a_folder["eval"]["ground_truth_starts"] = (3,)
    with pytest.raises(ConfigError, match=r"ground_truth_starts: expected \(low, high\) or \(\)"):
        from_config_dict(from_a_folder)


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
