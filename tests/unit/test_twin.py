import dataclasses

import numpy as np
import pytest
from absl import logging

from configs import grpo
from evac_jax.config.build import default_config, from_config_dict
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import cards, start_frames
from evac_jax.rollout import Played
from evac_jax.twin import Twin, excess, replay
from tests.unit.fakes import FakeGroundTruth

T, K, A = 2, 2, 7


def _played(real, imagined=None) -> Played:
    """Episodes from start 1 that succeed for real where `real` says so."""
    real = np.asarray(real, bool)
    actions = np.zeros((len(real), T, K, A), np.float32)
    actions[real, 0, 0, 0] = 5
    starts = np.ones(len(real), np.int64)
    return Played(starts, actions, real if imagined is None else np.asarray(imagined, bool))


def _twin(real=None, **options) -> Twin:
    config = default_config("grpo")
    shared = config.env.initial_states  # imagination and ground truth share their start ids
    options = {"twin_fraction": 1.0, "twin_window": 64, "ground_truth": shared} | options
    options = dataclasses.replace(config.eval, **options)
    return Twin(dataclasses.replace(config, eval=options), real or FakeGroundTruth())


def test_success_of_every_sequence_comes_back_when_they_fill_several_rows():
    real = FakeGroundTruth(num_envs=3)
    starts = np.array([5, 1, 9, 0, 4])
    actions = np.zeros((5, T, K, A), np.float32)
    actions[:, :, :, 0] = 1.2  # 4.8 after all actions

    success = replay(real, starts, actions)

    assert success.tolist() == [False, True, False, True, True]
    assert real.started == [[5, 1, 9], [0, 4, -1]]
    assert real.open == 0


def test_success_is_latched_when_later_actions_take_it_back():
    actions = np.zeros((1, T, K, A), np.float32)
    actions[0, 0, :, 0], actions[0, 1, :, 0] = 3, -9

    assert replay(FakeGroundTruth(), np.array([2]), actions).tolist() == [True]


def test_replay_is_refused_when_chunks_differ():
    with pytest.raises(DataError, match="share their chunk"):
        replay(FakeGroundTruth(chunk=K), np.array([1]), np.zeros((1, T, K + 1, A), np.float32))


def test_metrics_are_shares_when_imagination_and_truth_differ():
    played = _played(real=[1, 0, 0, 1], imagined=[1, 1, 1, 0])

    metrics = _twin().check(0, played)

    assert metrics["eval/imagined_success"] == 0.75
    assert metrics["eval/real_success"] == 0.5
    assert metrics["eval/success_agreement"] == 0.25
    assert metrics["eval/false_success"] == pytest.approx(2 / 3)


def test_replay_begins_in_the_states_that_the_start_frames_show(tmp_path):
    cards.write_json(tmp_path / "card.json", {"states": [30, 10, 20]})
    for name in (start_frames.IMAGES_FILE, start_frames.TASKS_FILE):
        np.save(tmp_path / name, np.zeros(3, np.int32))
    config = default_config("grpo")
    config = dataclasses.replace(
        config,
        env=dataclasses.replace(
            config.env, initial_states="npy", initial_states_path=str(tmp_path)
        ),
        eval=dataclasses.replace(config.eval, twin_fraction=1.0, ground_truth="miniature"),
    )
    real, played = FakeGroundTruth(), _played(real=[1, 0])
    played.starts[:] = 2, 0
    Twin(config, real).check(0, played)
    assert [start for row in real.started for start in row if start >= 0] == [20, 30]


def test_share_of_false_successes_is_absent_when_nothing_succeeded():
    metrics = _twin().check(0, _played(real=[1, 0], imagined=[0, 0]))

    assert "eval/false_success" not in metrics
    assert metrics["eval/twin_alarm"] == 0


def test_nothing_is_replayed_when_the_fraction_is_zero():
    real = FakeGroundTruth()

    assert _twin(real, twin_fraction=0.0).check(0, _played(real=[1])) == {}
    assert real.started == []


def test_sample_repeats_for_an_iteration_and_changes_with_it():
    def sampled(iteration):
        real = FakeGroundTruth(num_envs=5)
        starts = np.arange(20)
        played = Played(starts, np.zeros((20, T, K, A), np.float32), np.zeros(20, bool))
        _twin(real, twin_fraction=0.25).check(iteration, played)
        return real.started

    assert sampled(3) == sampled(3) != sampled(4)
    assert len(sampled(3)[0]) == len(set(sampled(3)[0])) == 5


def test_excess_has_the_bound_of_the_paper_when_worked_by_hand():
    # 6 of 10 succeed in imagination only, 1 for real only: p = 7/12, q = 2/12.
    imagined = np.array([1] * 6 + [0] + [1] * 3, bool)
    real = np.array([0] * 6 + [1] + [1] * 3, bool)

    gap, least = excess(imagined, real)

    assert gap == 0.5
    variance = (7 / 12 + 2 / 12 - (5 / 12) ** 2) / 12
    assert least == pytest.approx(5 / 12 - 1.6448536 * variance**0.5)


def test_excess_proves_nothing_when_there_are_no_replays():
    assert excess(np.zeros(0, bool), np.zeros(0, bool)) == (0.0, -1.0)


def test_alarm_names_numbers_and_remedy_when_imagination_flatters(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    twin = _twin(twin_alarm=0.1)
    played = _played(real=[0] * 12 + [1] * 4, imagined=[1] * 16)

    metrics = twin.check(7, played)

    assert metrics["eval/twin_alarm"] == 1
    assert twin.alarm
    assert not twin.must_stop  # only warns by default
    (text,) = said
    for part in ("iteration 8", "last 16 episodes", "100 % succeed in imagination", "25 % for real",
                 "12 of 16", "docs/reward_hacking.md", "config.eval.twin_alarm"):  # fmt: skip
        assert part in text


def test_run_must_stop_when_the_alarm_stands_and_so_configured():
    twin = _twin(twin_action="stop")
    assert not twin.must_stop
    twin.check(0, _played(real=[0] * 16, imagined=[1] * 16))
    assert twin.must_stop


@pytest.mark.parametrize(
    ("real", "imagined"),
    [
        ([1] * 16, [0] * 16),  # too pessimistic is no exploit
        ([0] * 2 + [1] * 14, [1] * 16),  # may be chance
        ([1] * 16, [1] * 16),
    ],
)
def test_alarm_stays_silent_when_imagination_does_not_flatter(real, imagined):
    assert _twin().check(0, _played(real, imagined))["eval/twin_alarm"] == 0


def test_alarm_ends_when_old_replays_leave_the_window():
    twin = _twin(twin_window=16)
    twin.check(0, _played(real=[0] * 16, imagined=[1] * 16))
    assert twin.alarm
    twin.check(1, _played(real=[1] * 16))
    assert not twin.alarm


def test_window_goes_on_when_a_run_is_resumed():
    first, second = _twin(), _twin()
    first.check(0, _played(real=[0] * 5, imagined=[1] * 5))
    second.load_state_dict(first.state_dict())
    more = _played(real=[0] * 3, imagined=[1] * 3)

    assert first.check(1, more) == second.check(1, more)
    assert first.state_dict() == second.state_dict() == [[1, 0]] * 8


def test_configuration_is_refused_when_there_is_nothing_to_replay_in():
    config = grpo.get_config()
    config.eval.twin_fraction = 0.25
    config.eval.ground_truth = "none"
    with pytest.raises(ConfigError, match=r"twin_fraction = 0.25 needs one to replay in"):
        from_config_dict(config.to_dict())


def test_configuration_is_refused_when_twin_values_are_out_of_range():
    config = grpo.get_config()
    config.eval.update(twin_fraction=1.5, twin_window=0, twin_alarm=-0.1, twin_action="halt")
    with pytest.raises(ConfigError) as caught:
        from_config_dict(config.to_dict())
    for field in ("twin_fraction", "twin_window", "twin_alarm", "twin_action"):
        assert f"config.eval.{field}" in str(caught.value)
