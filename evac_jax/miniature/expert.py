"""Scripted players of the tabletop, good and deliberately bad, batched over scenes.

They follow a schedule (reach in 8 steps, close in 2, carry in 7, lower in 2, open in 2, retreat)
and do not move at full speed. A policy decides once every 8 steps, so demonstrations must show
what is right at those steps. At full speed all actions would be at the limits.
"""

from dataclasses import dataclass

import numpy as np

from evac_jax.miniature import scene as world
from evac_jax.miniature.scene import DISTRACTOR, TABLETOP, TARGET, Scenes, Tabletop

REACH, CLOSE, CARRY, LOWER, OPEN, RETREAT = range(6)
# Random players turn less than they move; pictures of a gripper on its side are not useful.
RANDOM_TILT = 0.3
KINDS = ("expert", "noisy", "sloppy", "near_miss", "random_midway", "random")


@dataclass(frozen=True)
class Schedule:
    """Times and places of the scripted player.

    Attributes:
        reach_steps, carry_steps, lower_steps, retreat_steps: steps of each moving phase.
        pace: metres per step; a short way takes fewer steps than its phase allows.
        tolerance: distance from a goal, metres, within which it counts as reached.
        carry_height: height of the tip while carrying, metres.
        retreat_height: height of the tip at the end, metres.
    """

    reach_steps: int = 8
    carry_steps: int = 7
    lower_steps: int = 2
    retreat_steps: int = 3
    pace: float = 0.012
    tolerance: float = 0.006
    carry_height: float = 0.085
    retreat_height: float = 0.11


@dataclass(frozen=True)
class Flaws:
    """How a player deviates from the expert, for whom all values are zero.

    Attributes:
        grasp_offset: largest error of the grasp position, in a random direction, metres.
        place_left: distance to the left of the plate's centre at which it puts the block down,
            metres, mean and standard deviation.
        place_offset: largest additional error of that position, in a random direction, metres.
        either_block: share of episodes in which it takes the distractor.
        blind: share of episodes in which it does not notice that a grasp has failed.
        noise: standard deviation of each action entry except the gripper's.
        gripper_flips: share of steps in which the gripper does the opposite.
        turns_random: from a step drawn from [low, high) on it acts at random.
    """

    grasp_offset: float = 0.0
    place_left: tuple[float, float] = (0.0, 0.0)
    place_offset: float = 0.0
    either_block: float = 0.0
    blind: float = 0.0
    noise: float = 0.0
    gripper_flips: float = 0.0
    turns_random: tuple[int, int] | None = None


SCHEDULE = Schedule()
FLAWS = {
    "expert": Flaws(),
    "noisy": Flaws(noise=0.15, gripper_flips=0.01),
    # Puts the block down just outside of the area that counts. It succeeds at times, and always
    # fails in the same way, which reinforcement learning can correct. The picture shows the cause.
    "sloppy": Flaws(place_left=(0.05, 0.008)),
    "near_miss": Flaws(
        grasp_offset=0.065, place_offset=0.09, either_block=0.3, blind=0.7, noise=0.05
    ),
    "random_midway": Flaws(noise=0.05, turns_random=(2, 24)),
    "random": Flaws(turns_random=(0, 1)),
}


class Expert:
    """Plays one batch of episodes; make a new one for the next batch.

    It reads the state, so it may begin anywhere in an episode. Besides, it remembers its current
    phase and how many steps are left in it.

    Args:
        kind: one of `KINDS`.
        rng: draws the flaws; the expert without flaws uses none.
        flaws: replaces those of `kind`.
    """

    def __init__(
        self,
        kind: str = "expert",
        rng: np.random.Generator | None = None,
        *,
        flaws: Flaws | None = None,
        schedule: Schedule = SCHEDULE,
        table: Tabletop = TABLETOP,
    ):
        if flaws is None and kind not in FLAWS:
            raise ValueError(f"expert kind: expected one of {KINDS}, got {kind!r}")
        self._flaws = FLAWS[kind] if flaws is None else flaws
        self._rng = np.random.default_rng(0) if rng is None else rng
        self._schedule, self._table = schedule, table
        self._phase: np.ndarray | None = None

    def act(self, scenes: Scenes) -> np.ndarray:
        """Return the next action of every scene, float32 [N 7] as `scene.step` takes them."""
        before = self._begin(scenes) if self._phase is None else self._phase
        phase = self._next_phase(scenes, before)
        goal = self._goal(scenes, phase)
        way = goal - scenes.position
        far = np.abs(way).max(1)
        steps = self._steps_of_phase[phase]
        planned = np.clip(np.ceil(far / self._schedule.pace), 1, steps).astype(np.int64)
        self._left = np.where(phase == before, np.maximum(self._left - 1, 1), planned)
        self._phase = phase

        actions = np.zeros((len(scenes), world.ACTION_DIM))
        actions[:, :3] = way / self._left[:, None] / self._table.max_translation
        # Turn back upright: the rotation vector of the inverse orientation, by the shortest way.
        sign = np.where(scenes.quaternion[:, 3:] < 0, 1.0, -1.0)
        actions[:, 3:6] = sign * 2 * scenes.quaternion[:, :3] / self._table.max_rotation
        actions[:, 6] = np.where(self._closes(scenes, phase), 1.0, -1.0)
        actions = self._spoil(np.clip(actions, -1, 1))
        self._time += 1
        return actions.astype(np.float32)

    def _begin(self, scenes: Scenes) -> np.ndarray:
        count, flaws, rng = len(scenes), self._flaws, self._rng
        schedule = self._schedule
        self._steps_of_phase = np.array(
            (
                schedule.reach_steps,
                1,
                schedule.carry_steps,
                schedule.lower_steps,
                1,
                schedule.retreat_steps,
            )
        )
        self._time, self._left = 0, np.ones(count, np.int64)
        self._block = np.where(rng.random(count) < flaws.either_block, DISTRACTOR, TARGET)
        self._blind = rng.random(count) < flaws.blind
        direction = rng.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        direction[:, 2] = np.abs(direction[:, 2])  # below the block's centre is the table
        self._aim = direction * rng.uniform(0, flaws.grasp_offset, (count, 1))
        angle = rng.uniform(0, 2 * np.pi, count)
        offset = rng.uniform(0, flaws.place_offset, count)
        self._place = offset[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
        left, spread = flaws.place_left
        self._place[:, 0] -= left + spread * rng.standard_normal(count)
        low, high = flaws.turns_random or (np.iinfo(np.int32).max - 1, np.iinfo(np.int32).max)
        self._turns = rng.integers(low, high, count)
        self._drift = np.zeros((count, world.ACTION_DIM))

        own = scenes.blocks[np.arange(count), self._block]
        placed = self._on_place(scenes, own) & (scenes.held != self._block)
        closed = scenes.opening <= self._table.open_above
        carries = np.where(self._blind, closed, scenes.held == self._block)
        self._start = np.where(carries, CARRY, np.where(placed, RETREAT, REACH))
        # With -1 as the previous phase, `act` plans the steps of the first one.
        return np.full(count, -1)

    def _on_place(self, scenes: Scenes, block: np.ndarray) -> np.ndarray:
        near = np.linalg.norm(block[:, :2] - scenes.plate - self._place, axis=1)
        return near < self._table.success_radius

    def _goal(self, scenes: Scenes, phase: np.ndarray) -> np.ndarray:
        """Where the tip should be at the end of each phase, [N 3]."""
        schedule = self._schedule
        own = scenes.blocks[np.arange(len(scenes)), self._block]
        grasp = own + self._aim
        over = np.concatenate(
            (scenes.plate + self._place, np.full((len(scenes), 1), schedule.carry_height)), 1
        )
        down = over.copy()
        down[:, 2] = self._table.block_size / 2
        up = scenes.position.copy()
        up[:, 2] = schedule.retreat_height
        goals = np.stack((grasp, grasp, over, down, down, up), 1)
        goal = goals[np.arange(len(scenes)), phase]
        # Stay still while the fingers move, even if the goal has moved with the block.
        still = (phase == CLOSE) | (phase == OPEN)
        goal = np.where(still[:, None], scenes.position, goal)
        return np.clip(goal, self._table.workspace_low, self._table.workspace_high)

    def _next_phase(self, scenes: Scenes, before: np.ndarray) -> np.ndarray:
        table, tolerance = self._table, self._schedule.tolerance
        rows = np.arange(len(scenes))
        phase = np.where(before < 0, self._start, before)
        own = scenes.blocks[rows, self._block]
        holds = np.where(self._blind, True, scenes.held == self._block)
        closed = scenes.opening < table.closed_below
        released = scenes.opening > table.open_above

        def there(which):
            way = self._goal(scenes, np.full(len(scenes), which)) - scenes.position
            return np.abs(way).max(1) < tolerance

        # Later lines see the changes of earlier ones, so a phase without work is skipped.
        lost = ~self._blind & ~holds & np.isin(phase, (CARRY, LOWER)) & ~released
        dropped = ~self._blind & ~holds & released & np.isin(phase, (CARRY, LOWER, OPEN, RETREAT))
        phase = np.where(lost | (dropped & ~self._on_place(scenes, own)), REACH, phase)
        phase = np.where((phase == REACH) & there(REACH) & (scenes.held < 0), CLOSE, phase)
        phase = np.where((phase == CLOSE) & closed, np.where(holds, CARRY, REACH), phase)
        phase = np.where((phase == CARRY) & there(CARRY), LOWER, phase)
        phase = np.where((phase == LOWER) & there(LOWER), OPEN, phase)
        return np.where((phase == OPEN) & released, RETREAT, phase)

    def _closes(self, scenes: Scenes, phase: np.ndarray) -> np.ndarray:
        return (phase == CLOSE) | (phase == CARRY) | (phase == LOWER)

    def _spoil(self, actions: np.ndarray) -> np.ndarray:
        flaws, rng = self._flaws, self._rng
        if flaws.noise:
            actions[:, :6] += rng.standard_normal(actions[:, :6].shape) * flaws.noise
        if flaws.gripper_flips:
            actions[rng.random(len(actions)) < flaws.gripper_flips, 6] *= -1
        if flaws.turns_random is not None:
            # A drift that changes from time to time reaches more states than new noise every step.
            fresh = rng.random(len(actions)) < 0.2
            new = np.clip(rng.standard_normal(actions.shape) * 0.6, -1, 1)
            new[:, 3:6] *= RANDOM_TILT
            new[:, 6] = np.where(new[:, 6] > 0, 1.0, -1.0)
            starts = self._time == self._turns
            self._drift = np.where((fresh | starts)[:, None], new, self._drift)
            noise = 0.2 * rng.standard_normal(actions.shape)
            noise[:, 3:6] *= RANDOM_TILT
            noise[:, 6] = 0
            random = self._drift + noise
            actions = np.where((self._time >= self._turns)[:, None], random, actions)
        return np.clip(actions, -1, 1)


def demonstrate(
    scenes: Scenes, expert: Expert, steps: int, table: Tabletop = TABLETOP
) -> tuple[np.ndarray, list[Scenes]]:
    """Play `steps` actions; return them, float32 [N steps 7], and the steps + 1 states.

    With a new `Expert` this labels any state with the actions that it would take next; `scenes`
    are not changed.
    """
    states, actions = [scenes], []
    for _ in range(steps):
        actions.append(expert.act(states[-1]))
        states.append(world.step(states[-1], actions[-1], table))
    return np.stack(actions, 1), states
