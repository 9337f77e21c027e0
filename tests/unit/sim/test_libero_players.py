"""Scripted players of LIBERO on a stand-in without contacts (`libero_toy`)."""

import dataclasses

import numpy as np
import pytest

from evac_jax.errors import DataError
from evac_jax.sim.libero_bddl import read_problem
from evac_jax.sim.libero_players import (
    CLOSE,
    FLAWS,
    KINDS,
    LiberoPlayer,
    UnknownTaskError,
    about_z,
    multiply,
    pick_and_place,
    rotation_vector,
    scripted_tasks,
)
from evac_jax.sim.libero_tasks import Suite
from tests.unit.sim import libero_toy
from tests.unit.sim.libero_toy import BOWL, OTHER, PLATE, PROBLEM, Toy

TASK = pick_and_place("t", PROBLEM)


def rate(kind, count=20):
    return np.mean([libero_toy.play(kind, seed)[0].success for seed in range(count)])


@pytest.mark.parametrize("bowl", [(-0.05, -0.10), (0.1, 0.0), (-0.15, 0.3)])
def test_expert_puts_the_bowl_on_the_plate_from_anywhere(bowl):
    world, actions = libero_toy.play("expert", world=Toy(bowl))
    assert world.success
    assert len(actions) < 120


@pytest.mark.parametrize("repeat", [2, 5])
def test_expert_keeps_its_aim_when_every_action_is_repeated(repeat):
    world, actions = libero_toy.play("expert", steps=60, repeat=repeat)
    assert world.success
    assert len(actions) < libero_toy.play("expert")[1].shape[0]


def test_noisy_mostly_succeeds_and_bad_players_mostly_fail():
    assert rate("noisy") >= 0.6
    assert rate("near_miss") <= 0.4
    assert rate("midway") <= 0.4
    assert rate("sloppy") <= 0.1


def test_sloppy_puts_the_bowl_beside_the_plates_middle():
    ends = [libero_toy.play("sloppy", seed)[0].places for seed in range(5)]
    ways = np.array([end[BOWL][:2] - end[PLATE][:2] for end in ends])
    np.testing.assert_allclose(ways, [[0, -0.05]] * 5, atol=0.03)
    assert (ways[:, 1] < -0.03).all()


def test_rim_is_taken_on_the_side_away_from_the_cabinet():
    world, sides = Toy(), []
    for y in (-0.17, 0.17):
        world.places["wooden_cabinet_1"][:2] = world.places[BOWL][:2] + [0, y]
        player = LiberoPlayer("expert", TASK, np.random.default_rng(0))
        player.act(world.pose, world.places)
        sides.append(player._side[1])
    assert sides == [1, -1]


def test_wrist_turns_across_a_drawer_and_takes_the_rim_towards_its_middle():
    world = Toy()
    task = dataclasses.replace(TASK, drawer="drawer", cabinet="wooden_cabinet_1")
    world.places["wooden_cabinet_1"][3:] = about_z(np.radians(150))
    # Across the drawer is the cabinet's x, (-.87, .5); the fingers close along y when they point
    # down, so they turn by 60 degrees.
    across = np.array([-np.sqrt(3) / 2, 0.5])
    for towards in (1, -1):
        world.places["drawer"] = world.places[BOWL].copy()
        world.places["drawer"][:2] += 0.02 * towards * across
        player = LiberoPlayer("expert", task, np.random.default_rng(0))
        player.act(world.pose, world.places)
        np.testing.assert_allclose(player._side[:2], towards * across, atol=1e-6)
        turn = rotation_vector(np.array([1.0, 0, 0, 0]), player._wrist)
        np.testing.assert_allclose(turn, [0, 0, np.radians(60)], atol=1e-6)


def test_grasp_that_failed_is_tried_again():
    world = Toy()
    player = LiberoPlayer("expert", TASK, np.random.default_rng(0))
    for _ in range(150):
        world.step(player.act(world.pose, world.places))
        if player._phase == CLOSE and world.held and "once" not in vars(world):
            world.held, world.once = "", True
            world.places[BOWL][0] += 0.05  # it slipped away
        if world.success:
            break
    assert world.once
    assert world.success


def test_thing_that_rolled_off_is_picked_up_again():
    world = Toy()
    player = LiberoPlayer("expert", TASK, np.random.default_rng(0))
    for _ in range(250):
        world.step(player.act(world.pose, world.places))
        if world.success and "once" not in vars(world):
            world.once = True
            world.places[BOWL][:3] += [-0.05, -0.08, -0.012]
        elif world.success:
            break
    assert world.once
    assert world.success


def test_near_miss_takes_the_other_bowl_at_times():
    worlds = [libero_toy.play("near_miss", seed)[0] for seed in range(30)]
    moved = [bool(np.abs(w.places[OTHER][:2] - [-0.2, 0.3]).max() > 0.02) for w in worlds]
    assert 0 < sum(moved) < 15


def test_same_seed_gives_the_same_actions_and_another_one_others():
    for kind in KINDS[1:]:
        first, again, other = (libero_toy.play(kind, seed)[1] for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert first.shape != other.shape or not np.array_equal(first, other)


@pytest.mark.parametrize("kind", ["expert", "noisy"])
def test_what_was_intended_is_told_beside_what_noise_made_of_it(kind):
    world = libero_toy.Toy()
    player = LiberoPlayer(kind, TASK, np.random.default_rng(0))
    played, intended = [], []
    for _ in range(30):
        played.append(player.act(world.pose, world.places))
        intended.append(player.intended)
        world.step(played[-1])
    if kind == "expert":
        np.testing.assert_array_equal(played, intended)
    else:
        noise = np.subtract(played, intended)[:, 3:6]  # turns, which are not asked for
        np.testing.assert_allclose(noise.std(), FLAWS[kind].noise, rtol=0.2)
        assert not np.any(np.array(intended)[:, 3:6])


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="perfect"):
        LiberoPlayer("perfect", TASK, np.random.default_rng(0))


def test_turn_leads_from_one_orientation_to_the_other():
    down = np.array([1.0, 0, 0, 0])
    turned = multiply(about_z(0.3), down)
    np.testing.assert_allclose(rotation_vector(down, turned), [0, 0, 0.3], atol=1e-9)
    np.testing.assert_allclose(rotation_vector(down, -down), 0, atol=1e-9)


@pytest.mark.parametrize(
    ("goal", "why"),
    [
        ((("open", "cabinet_1_top_region"),), "open cabinet_1_top_region"),
        ((("on", BOWL, PLATE), ("close", "cabinet_1_top_region")), "2 goals"),
        ((("on", PLATE, "main_table_stove_front_region"),), "no grasp is known for plate_1"),
        ((("in", BOWL, "cabinet_1_top_region"),), "known for cabinet_1_top_region"),
    ],
)
def test_task_that_is_no_pick_and_place_is_refused_by_name_with_the_reason(goal, why):
    with pytest.raises(UnknownTaskError, match=f"close_it: .*{why}"):
        pick_and_place("close_it", dataclasses.replace(PROBLEM, goal=goal))


BDDL = """(define (problem Tabletop) (:domain robosuite)
  (:regions (left (:target main_table) (:ranges ((0.0 0.1 0.2 0.3)))))  ; a comment (
  (:fixtures main_table - table wooden_cabinet_1 - wooden_cabinet)
  (:objects akita_black_bowl_1 akita_black_bowl_2 - akita_black_bowl plate_1 - plate)
  (:init (In akita_black_bowl_1 wooden_cabinet_1_top_region) (Open wooden_cabinet_1_top_region))
  (:goal (And (On akita_black_bowl_1 plate_1))))
"""


def test_description_of_a_task_is_read(tmp_path):
    (tmp_path / "one.bddl").write_text(BDDL)
    problem = read_problem(tmp_path / "one.bddl")
    assert set(problem.bodies) == {BOWL, OTHER, PLATE, "main_table", "wooden_cabinet_1"}
    assert problem.goal == (("on", BOWL, PLATE),)
    assert ("open", "wooden_cabinet_1_top_region") in problem.initial
    task = pick_and_place("one", problem)
    assert (task.drawer, task.cabinet) == ("wooden_cabinet_1_top_region", "wooden_cabinet_1")
    assert not TASK.drawer


@pytest.mark.parametrize("text", ["", "(define", "(define (:objects a - b) (:init))", "fine"])
def test_damaged_description_is_refused_by_name(tmp_path, text):
    (tmp_path / "one.bddl").write_text(text)
    with pytest.raises(DataError, match=r"one\.bddl"):
        read_problem(tmp_path / "one.bddl")


def test_tasks_that_scripts_cannot_do_are_left_out_with_the_reason(tmp_path, caplog):
    (tmp_path / "goals").mkdir()
    (tmp_path / "goals/put_it.bddl").write_text(BDDL)
    opens = BDDL.replace("On akita_black_bowl_1 plate_1", "Open wooden_cabinet_1_top_region")
    (tmp_path / "goals/open_it.bddl").write_text(opens)
    states = (np.zeros((2, 5)),) * 2
    known = scripted_tasks(tmp_path, Suite("goals", ("open_it", "put_it"), states))
    assert list(known) == [1]
    assert "open_it: its goal is open wooden_cabinet_1_top_region" in caplog.text
    with pytest.raises(DataError, match="none of its tasks"):
        scripted_tasks(tmp_path, Suite("goals", ("open_it",), states[:1]))
