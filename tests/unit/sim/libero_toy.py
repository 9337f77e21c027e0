"""A stand-in for the table of a LIBERO task, for scripted players: no MuJoCo, no contacts.

The hand moves by a share of what an action asks for. It takes a thing when its fingers close near
the place where that is grasped, and the thing falls onto the place below when they open.
"""

import numpy as np

from evac_jax.sim.libero_bddl import Problem
from evac_jax.sim.libero_players import GRASPS, PLACES, LiberoPlayer, pick_and_place

BOWL, PLATE, OTHER = "akita_black_bowl_1", "plate_1", "akita_black_bowl_2"
PROBLEM = Problem(
    bodies=(BOWL, OTHER, PLATE, "main_table", "wooden_cabinet_1"),
    initial=(("on", BOWL, "main_table_left"),),
    goal=(("on", BOWL, PLATE),),
)
TABLE = 0.90  # metres
STEP, TURN = 0.015, 0.15  # metres and radians of a full action


def thing(x, y, z=TABLE):
    return np.array([x, y, z, 0.0, 0.0, 0.0, 1.0])


class Toy:
    """One episode; `places` and `pose` are what players read."""

    def __init__(self, bowl=(-0.05, -0.10), plate=(0.06, 0.20)):
        self.places = {
            BOWL: thing(*bowl),
            OTHER: thing(-0.2, 0.3),
            PLATE: thing(*plate),
            "wooden_cabinet_1": thing(bowl[0], bowl[1] - 0.17),
        }
        self.pose = np.array([-0.2, 0.0, 1.17, 1.0, 0.0, 0.0, 0.0, 1.0])
        self.held = ""

    @property
    def success(self):
        way = self.places[BOWL][:3] - self.places[PLATE][:3]
        return bool(np.linalg.norm(way[:2]) < 0.03 and abs(way[2] - PLACES["plate"]) < 0.01)

    def step(self, action):
        assert action.dtype == np.float32
        assert action.shape == (7,)
        assert np.abs(action).max() <= 1
        before, closed = self.pose[:3].copy(), self.pose[7] < 0.4
        self.pose[:3] += STEP * action[:3]
        self.pose[7] = np.clip(self.pose[7] - 0.2 * np.sign(action[6]), 0.3, 1.0)
        if self.held:
            self.places[self.held][:3] += self.pose[:3] - before
        if self.pose[7] < 0.4 and not closed and not self.held:
            self.held = next((n for n in (BOWL, OTHER) if self._within(n)), "")
        if self.pose[7] > 0.5 and self.held:
            where = self.places[self.held]
            over = np.linalg.norm((where - self.places[PLATE])[:2]) < 0.07
            where[2] = TABLE + PLACES["plate"] * over
            self.held = ""

    def _within(self, name):
        grasp, way = GRASPS["akita_black_bowl"], self.pose[:3] - self.places[name][:3]
        aside = abs(np.linalg.norm(way[:2]) - grasp.aside)
        return aside < 0.015 and abs(way[2] - grasp.up) < 0.015


def play(kind, seed=0, steps=150, world=None, repeat=1):
    """Return the world at the end and the actions [n 7] until the first success, or all.

    Each action is played `repeat` times.
    """
    world = world or Toy()
    player = LiberoPlayer(
        kind, pick_and_place("t", PROBLEM), np.random.default_rng(seed), repeat=repeat
    )
    actions = []
    while len(actions) < steps and not world.success:
        actions.append(player.act(world.pose, world.places))
        for _ in range(repeat):
            world.step(actions[-1])
    return world, np.array(actions)
