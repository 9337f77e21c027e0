import dataclasses

import pytest
import torch

from evac_jax.errors import ConfigError
from evac_jax.sim.episodes import EpisodeRules, EpisodeStates

RULES = EpisodeRules(max_episode_steps=6, coefficient=5.0)


def play(rules, *chunks):
    """Outcomes of chunks of probabilities [B K]."""
    chunks = [torch.tensor(chunk) for chunk in chunks]
    episodes = EpisodeStates(len(chunks[0]), rules)
    return [episodes.advance(chunk) for chunk in chunks], episodes


def test_each_environment_terminates_on_its_own():
    (first, second), episodes = play(RULES, [[0.0, 0.9], [0.1, 0.2]], [[0.0, 0.0], [0.6, 0.0]])
    assert first.terminated.tolist() == [True, False]
    assert second.terminated.tolist() == [True, True]
    assert episodes.figures()["length"].tolist() == [2.0, 4.0]
    assert episodes.running.tolist() == [False, False]


def test_success_and_its_reward_stay_when_the_classifier_flickers():
    (outcome,), _ = play(RULES, [[0.0, 0.9, 0.1, 0.8, 0.0]])
    assert outcome.rewards.tolist() == [[0.0, 5.0, 0.0, 0.0, 0.0]]
    assert outcome.success.tolist() == [True]


def test_relative_rewards_add_up_to_the_scaled_score():
    outcomes, episodes = play(
        dataclasses.replace(RULES, max_episode_steps=100, ignore_terminations=True),
        [[0.1, 0.2]], [[0.7, 0.0]], [[0.9, 0.1]],
    )  # fmt: skip
    assert torch.cat([o.rewards for o in outcomes], 1).sum() == 5.0
    assert episodes.figures()["return"].tolist() == [5.0]


def test_plain_rewards_carry_the_coefficient():
    (outcome,), _ = play(dataclasses.replace(RULES, relative=False), [[0.0, 0.9, 0.0]])
    assert outcome.rewards.tolist() == [[0.0, 5.0, 5.0]]


def test_success_needs_frames_in_a_row_across_chunks():
    rules = dataclasses.replace(RULES, success_frames=2)
    (first, second), _ = play(rules, [[0.9, 0.0], [0.0, 0.9]], [[0.9, 0.0], [0.9, 0.0]])
    assert first.success.tolist() == [False, False]
    assert second.success.tolist() == [False, True]
    assert second.rewards.tolist() == [[0.0, 0.0], [5.0, 0.0]]


def test_truncation_follows_each_environments_own_clock():
    quiet = torch.zeros(2, 3)
    episodes = EpisodeStates(2, RULES)
    episodes.advance(quiet)
    episodes.restart(torch.tensor([False, True]))
    assert episodes.advance(quiet).truncated.tolist() == [True, False]
    assert episodes.advance(quiet).truncated.tolist() == [True, True]


def test_termination_wins_when_the_time_is_up_too():
    (outcome,), _ = play(RULES, [[0.0] * 5 + [0.9]])
    assert outcome.terminated.tolist() == [True]
    assert outcome.truncated.tolist() == [False]


def test_only_time_ends_an_episode_when_terminations_are_ignored():
    rules = dataclasses.replace(RULES, ignore_terminations=True)
    (first, second), _ = play(rules, [[0.9, 0.0, 0.0]], [[0.0, 0.0, 0.0]])
    assert not first.terminated.any()
    assert first.success.all()
    assert second.truncated.all()


def test_nothing_is_earned_after_the_end():
    rules = dataclasses.replace(RULES, relative=False)
    (_, second), episodes = play(rules, [[0.9, 0.9]], [[float("nan"), 0.9]])
    assert second.rewards.tolist() == [[0.0, 0.0]]
    assert episodes.figures()["return"].tolist() == [10.0]
    assert episodes.figures()["length"].tolist() == [2.0]


def test_idle_environments_stay_silent():
    episodes = EpisodeStates(2, RULES)
    idle = torch.tensor([True, False])
    episodes.restart(torch.ones(2, dtype=torch.bool), idle)
    outcome = episodes.advance(torch.full((2, 6), 0.9))
    assert outcome.terminated.tolist() == [False, True]
    assert outcome.rewards[0].abs().sum() == 0
    assert episodes.figures()["success_once"].tolist() == [0.0, 1.0]


def test_an_outcome_keeps_its_values_when_the_environment_restarts():
    (outcome,), episodes = play(RULES, [[0.9]])
    figures = episodes.figures()
    episodes.restart(torch.tensor([True]))
    assert outcome.terminated.tolist() == [True]
    assert figures["return"].tolist() == [5.0]
    assert episodes.running.tolist() == [True]


def test_reference_rules_take_rewards_back_and_truncate_everyone():
    rules = dataclasses.replace(RULES, max_episode_steps=4, reference_compat=True)
    (first, second), _ = play(rules, [[0.5, 0.6], [0.0, 0.0]], [[0.4, 0.0], [0.0, 0.0]])
    assert first.rewards.tolist() == [[0.0, 5.0], [0.0, 0.0]]
    assert second.rewards.tolist() == [[-5.0, 0.0], [0.0, 0.0]]
    assert first.terminated.tolist() == [True, False]
    assert second.terminated.tolist() == [False, False]
    assert second.truncated.tolist() == [True, True]


def test_reference_rules_forget_the_coefficient_without_relative_rewards():
    rules = dataclasses.replace(RULES, relative=False, reference_compat=True)
    (outcome,), _ = play(rules, [[0.9, 0.1]])
    assert outcome.rewards.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_episode_steps", 0), ("threshold", 0.0), ("success_frames", 0)],
)
def test_impossible_rules_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(RULES, **{field: value})
