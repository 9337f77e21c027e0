"""Scripted players of LIBERO's pick-and-place tasks, good and deliberately bad. NumPy only.

They are told where everything is (`LiberoPool.look`) and act as a policy does, by changes of the
pose. Heights and distances were found by trial in MuJoCo; docs/libero.md has the success rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging

from evac_jax.errors import DataError
from evac_jax.sim.libero_bddl import Problem, kind_of, read_problem
from evac_jax.sim.libero_tasks import Suite

REACH, DESCEND, CLOSE, LIFT, CARRY, LOWER, OPEN, RETREAT = range(8)
DOWN = np.array([1.0, 0.0, 0.0, 0.0])  # quaternion xyzw: fingers point down and close along y
ACTION_DIM = 7


class UnknownTaskError(DataError):
    """No scripted player can do a task."""


@dataclass(frozen=True)
class Grasp:
    """Where the fingers close round a thing, metres.

    Attributes:
        aside: from the thing's axis, in the direction in which the fingers close: a bowl is taken
            by its rim.
        up: above its origin.
    """

    aside: float = 0.0
    up: float = 0.0


GRASPS = {
    "akita_black_bowl": Grasp(aside=0.049, up=0.038),
}
STRIDE = 0.015  # metres that a full action moves the hand in 1/20 s
# Kind of fixture -> height of its top above its origin, metres. The hand, 20 cm wide, keeps clear
# of these; lower things matter to the fingers only.
TALL = {"wooden_cabinet": 0.22}
BREADTH = 0.15  # metres from a tall thing's middle to its side
ROOM = 0.08  # metres from a finger to the middle of another thing that are enough
# Kind of place -> how high above its origin the thing's origin is when it is let go, metres.
PLACES = {
    "plate": 0.012,
    "flat_stove_cook_region": 0.005,
    "wooden_cabinet_top_side": 0.005,
}


@dataclass(frozen=True)
class PickAndPlace:
    """A task that a player can do.

    Attributes:
        pick, place: names in the `.bddl` file.
        grasp: how `pick` is taken.
        height: of its origin above that of `place` when it is let go, metres.
        obstacles: other bodies.
        drawer: the region in which `pick` stands at first, if it stands in one, and the body that
            the region is a part of; else "".
    """

    pick: str
    place: str
    grasp: Grasp
    height: float
    obstacles: tuple[str, ...]
    drawer: str = ""
    cabinet: str = ""


def pick_and_place(task: str, problem: Problem) -> PickAndPlace:
    """Return what a player must know of a task.

    Args:
        task: its name, for the message.

    Raises:
        UnknownTaskError: it is no pick-and-place that the players know; says why.
    """
    why = ""
    if len(problem.goal) != 1:
        why = f"it has {len(problem.goal)} goals"
    elif problem.goal[0][0] not in ("on", "in") or len(problem.goal[0]) != 3:
        why = f"its goal is {' '.join(problem.goal[0])}"
    else:
        _, pick, place = problem.goal[0]
        if kind_of(pick) not in GRASPS:
            why = f"no grasp is known for {pick}"
        elif kind_of(place) not in PLACES:
            why = f"no way of putting something down is known for {place}"
    if why:
        raise UnknownTaskError(
            f"{task}: {why}; scripted players pick up {', '.join(GRASPS)} and put it on "
            f"{', '.join(PLACES)}. Record this task with policies"
        )
    drawer = next((p[2] for p in problem.initial if p[:2] == ("in", pick)), "")
    return PickAndPlace(
        pick=pick,
        place=place,
        grasp=GRASPS[kind_of(pick)],
        height=PLACES[kind_of(place)],
        obstacles=tuple(name for name in problem.bodies if name not in (pick, place)),
        drawer=drawer,
        cabinet=next((body for body in problem.bodies if drawer.startswith(f"{body}_")), ""),
    )


def scripted_tasks(bddl_files: Path, suite: Suite) -> dict[int, PickAndPlace]:
    """Return which of the suite's tasks scripts can do, by number; log why not the others.

    Args:
        bddl_files: LIBERO's folder of that name.

    Raises:
        DataError: there are none.
    """
    known = {}
    for number, task in enumerate(suite.tasks):
        problem = read_problem(bddl_files / suite.name / f"{task}.bddl")
        try:
            known[number] = pick_and_place(task, problem)
        except UnknownTaskError as error:
            logging.warning("scripted players leave this task out: %s", error)
    if not known:
        raise DataError(
            f"{suite.name}: scripted players can do none of its tasks; the log says why. Choose "
            "another config.libero.suite, or policies in config.collect.mix"
        )
    return known


@dataclass(frozen=True)
class Flaws:
    """How a player deviates from the expert, for whom all values are zero.

    Attributes:
        grasp_offset: largest error of the grasp's position, in a random direction, metres.
        place_aside: distance from the place's middle, towards -y, at which the thing is put down,
            metres, mean and standard deviation.
        place_offset: largest additional error of that position, in a random direction, metres.
        other: share of episodes in which it takes another thing of the same kind, if there is one.
        unaware: share of episodes in which it does not notice that a grasp has failed.
        noise: standard deviation of each action entry except the gripper's.
        gripper_flips: share of actions in which the gripper does the opposite.
        turns_random: from an action drawn from [low, high) on it acts at random; at 20 Hz.
    """

    grasp_offset: float = 0.0
    place_aside: tuple[float, float] = (0.0, 0.0)
    place_offset: float = 0.0
    other: float = 0.0
    unaware: float = 0.0
    noise: float = 0.0
    gripper_flips: float = 0.0
    turns_random: tuple[int, int] | None = None


FLAWS = {
    "expert": Flaws(),
    "noisy": Flaws(noise=0.25, gripper_flips=0.01),
    # Always fails in the same way, just outside of the 3 cm that count: reinforcement learning can
    # correct that, and a picture shows it.
    "sloppy": Flaws(place_aside=(0.05, 0.008)),
    "near_miss": Flaws(grasp_offset=0.04, place_offset=0.09, other=0.2, unaware=0.7, noise=0.1),
    "midway": Flaws(noise=0.1, turns_random=(4, 60)),
}
KINDS = tuple(FLAWS)


@dataclass(frozen=True)
class Manner:
    """Distances and gains of the players; metres, radians, actions.

    Attributes:
        above: height above the grasp at which the hand arrives.
        lift: height above the grasp at which a thing is carried, at least; `out_of_drawer` instead
            if it stood in one.
        carry: height above the place at which it is carried, at least.
        tolerance: distance from a goal within which it counts as reached.
        gain: action per metre, at most as much as moves the hand there at once; see `STRIDE`.
        turn_gain: action per radian, played once; a full action asks for half a radian.
        slack: radians that the wrist may be off before it is turned back. LIBERO's controller
            holds an orientation by itself while it is asked for no change, and better so: with a
            stretched arm, turning and moving work against each other.
        squeeze: actions for which the fingers close or open, at least.
    """

    above: float = 0.07
    lift: float = 0.06
    out_of_drawer: float = 0.10
    carry: float = 0.06
    tolerance: float = 0.008
    gain: float = 33.0
    turn_gain: float = 2.0
    slack: float = 0.1
    squeeze: int = 3


class LiberoPlayer:
    """Plays one episode; make a new one for the next.

    Args:
        kind: one of `KINDS`.
        task: what to do.
        rng: draws the flaws; the expert uses none.
        repeat: how often LIBERO plays each action; turns are asked for smaller by that much, and
            `turns_random` comes that much earlier.
    """

    def __init__(
        self,
        kind: str,
        task: PickAndPlace,
        rng: np.random.Generator,
        manner: Manner = Manner(),
        *,
        repeat: int = 1,
    ):
        if kind not in FLAWS:
            raise ValueError(f"kind of player: expected one of {KINDS}, got {kind!r}")
        self._flaws, self._task, self._rng, self._manner = FLAWS[kind], task, rng, manner
        self._repeat = repeat
        self._phase, self._since = REACH, 0  # actions in this phase
        self._time = 0
        self._pick = ""
        self.intended = np.zeros(ACTION_DIM, np.float32)  # the last action without its noise

    def act(self, pose: np.ndarray, places: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the next action float32 [7] as LIBERO takes it: in [-1, 1], gripper +1 closes.

        Args:
            pose: of the hand: xyz (m), quaternion xyzw, gripper opening 0..1 [8].
            places: name -> xyz (m), quaternion xyzw [7].
        """
        pose = np.asarray(pose, float)
        if not self._pick:
            self._begin(places)
            self._stay = pose[:3].copy()  # where the hand was when the phase began
            self._opening, self._height = pose[7], places[self._pick][2]
        self._object = places[self._pick][:3]
        before, self._phase = self._phase, self._next(pose, places)
        self._since += 1
        if self._phase != before:
            self._since, self._stay = 0, pose[:3].copy()
        action = np.zeros(ACTION_DIM)
        way = self._goal(pose, places) - pose[:3]
        action[:3] = min(self._manner.gain, 1 / (STRIDE * self._repeat)) * way
        turn = rotation_vector(pose[3:7], self._wrist)
        if np.linalg.norm(turn) > self._manner.slack:
            action[3:6] = self._manner.turn_gain / self._repeat * turn
        action[6] = 1.0 if self._phase in (CLOSE, LIFT, CARRY, LOWER) else -1.0
        self.intended = np.clip(action, -1, 1).astype(np.float32)
        action = self._spoil(np.clip(action, -1, 1))
        self._time, self._opening, self._height = self._time + 1, pose[7], self._object[2]
        return action.astype(np.float32)

    def _begin(self, places: Mapping[str, np.ndarray]) -> None:
        flaws, rng, task = self._flaws, self._rng, self._task
        others = [name for name in task.obstacles if kind_of(name) == kind_of(task.pick)]
        takes_other = rng.random() < flaws.other and bool(others)
        self._pick = others[0] if takes_other else task.pick
        self._unaware = rng.random() < flaws.unaware
        self._aim = np.append(_disc(rng, flaws.grasp_offset), 0.0)
        aside, spread = flaws.place_aside
        self._shift = _disc(rng, flaws.place_offset)
        self._shift[1] -= aside + spread * rng.standard_normal()
        low, high = flaws.turns_random or (np.iinfo(np.int32).max - 1, np.iinfo(np.int32).max)
        self._turns = rng.integers(low, high) // self._repeat
        self._drift = np.zeros(ACTION_DIM)
        yaw = 0.0
        if task.cabinet and not takes_other:
            # Across the drawer: along it there is no room for a finger.
            yaw = yaw_of(places[task.cabinet][3:]) - np.pi / 2
            yaw = np.pi / 2 - (np.pi / 2 - yaw) % np.pi  # or the other way round
        self._side = self._roomier_side(places, yaw)
        self._wrist = multiply(about_z(yaw), DOWN)

    def _roomier_side(self, places: Mapping[str, np.ndarray], yaw: float) -> np.ndarray:
        """Return the direction [3] from the thing to the fingers in which there is more room."""
        here, along = places[self._pick][:2], np.array([-np.sin(yaw), np.cos(yaw)])
        if yaw:
            rooms = [(places[self._task.drawer][:2] - here) @ side for side in (along, -along)]
        else:
            fingers = [here + side * self._task.grasp.aside for side in (along, -along)]
            rooms = [min(self._distances(places, finger), default=np.inf) for finger in fingers]
            # Where both have room, the one that is nearer to the robot: the arm is short.
            if min(rooms) > ROOM:
                rooms = [-abs(finger[1]) for finger in fingers]
        return np.append(along if rooms[0] >= rooms[1] else -along, 0.0)

    def _distances(self, places: Mapping[str, np.ndarray], finger: np.ndarray) -> list[float]:
        """Return the way from obstacles to a finger [2], metres."""
        pick, found = places[self._pick], []
        for name in self._task.obstacles:
            # What the thing stands on is as near on either side.
            if name in places and np.linalg.norm(places[name][:2] - pick[:2]) > 0.03:
                beside = pick[2] < places[name][2] + TALL.get(kind_of(name), -np.inf)
                way = np.linalg.norm(places[name][:2] - finger)
                found.append(float(way) - BREADTH * beside)
        return found

    def _grasp_point(self) -> np.ndarray:
        grasp = self._task.grasp
        return self._object + self._side * grasp.aside + self._aim + [0, 0, grasp.up]

    def _goal(self, pose: np.ndarray, places: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return where the hand should be at the end of the phase [3]."""
        manner, here = self._manner, pose[:3]
        place = places[self._task.place][:3]
        over = here[:2] + place[:2] + self._shift - self._object[:2]
        held_below = here[2] - self._object[2]
        if self._phase == REACH:
            above = self._grasp_point() + [0, 0, manner.above]
            # Rise before moving sideways: the fingers may be within something. Come down within a
            # funnel: the hand is wider than its fingers, and a cabinet is higher than a bowl.
            if here[2] < above[2] - 0.04:
                return np.append(here[:2], above[2])
            far = np.linalg.norm(above[:2] - here[:2])
            return above + [0, 0, min(far, max(here[2] - above[2], 0))]
        if self._phase == DESCEND:
            return self._grasp_point()
        if self._phase == LIFT:
            return self._stay + [0, 0, manner.out_of_drawer if self._task.drawer else manner.lift]
        if self._phase == CARRY:
            # Come down on the way, too: high up the arm does not reach far enough.
            low = place[2] + self._task.height + manner.carry + held_below
            far = np.linalg.norm(over - here[:2])
            height = max(low, min(low + max(far - 0.1, 0), self._stay[2]))
            return np.append(over if here[2] > height - 0.03 else here[:2], height)
        if self._phase == LOWER:
            return np.append(over, place[2] + self._task.height + held_below - 0.01)
        if self._phase == RETREAT:
            return self._stay + [0, 0, manner.lift]
        return self._stay

    def _next(self, pose: np.ndarray, places: Mapping[str, np.ndarray]) -> int:
        """Return the phase of this action."""
        phase, manner = self._phase, self._manner
        way = np.abs(self._goal(pose, places) - pose[:3])
        turn = np.linalg.norm(rotation_vector(pose[3:7], self._wrist))
        there, waited = way.max() < manner.tolerance, self._since >= manner.squeeze
        still = waited and abs(pose[7] - self._opening) < 0.01
        held = np.linalg.norm(self._object - pose[:3]) < 0.09
        if phase in (LIFT, CARRY, LOWER) and not held and not self._unaware and waited:
            return REACH
        if phase == REACH and way.max() < 2 * manner.tolerance and turn < 1.5 * manner.slack:
            return DESCEND
        if phase == DESCEND and there:
            return CLOSE
        if phase == CLOSE and still:
            return LIFT
        if phase == LIFT and way[2] < 2 * manner.tolerance:
            return CARRY
        if phase == CARRY and way.max() < 2 * manner.tolerance:
            return LOWER
        low = self._object[2] < places[self._task.place][2] + self._task.height + 0.004
        stuck = self._since >= 5 and self._height - self._object[2] < 0.001
        if phase == LOWER and (low or stuck):
            return OPEN
        if phase == OPEN and still:
            return RETREAT
        missed = places[self._task.place][:2] + self._shift - self._object[:2]
        if phase == RETREAT and there and np.linalg.norm(missed) > 0.03 and not self._unaware:
            return REACH
        return phase

    def _spoil(self, action: np.ndarray) -> np.ndarray:
        flaws, rng = self._flaws, self._rng
        if flaws.noise:
            action[:6] += flaws.noise * rng.standard_normal(6)
        if flaws.gripper_flips and rng.random() < flaws.gripper_flips:
            action[6] *= -1
        if self._time >= self._turns:
            # A drift that changes from time to time reaches more states than noise alone.
            if self._time == self._turns or rng.random() < 0.2:
                self._drift = np.clip(0.6 * rng.standard_normal(ACTION_DIM), -1, 1)
                self._drift[3:6] *= 0.3  # a hand on its side shows little
                self._drift[6] = 1.0 if self._drift[6] > 0 else -1.0
            action = self._drift.copy()
        return np.clip(action, -1, 1)


def _disc(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Return a point [2] within `radius` of 0."""
    angle = rng.uniform(0, 2 * np.pi)
    return rng.uniform(0, radius) * np.array([np.cos(angle), np.sin(angle)])


def about_z(angle: float) -> np.ndarray:
    """Return the quaternion xyzw of a turn about the vertical, radians."""
    return np.array([0.0, 0.0, np.sin(angle / 2), np.cos(angle / 2)])


def yaw_of(quaternion: np.ndarray) -> float:
    """Return how far an orientation xyzw is turned about the vertical, radians."""
    x, y, z, w = quaternion
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the quaternion xyzw of turn `b` followed by turn `a`."""
    vector = a[3] * b[:3] + b[3] * a[:3] + np.cross(a[:3], b[:3])
    return np.append(vector, a[3] * b[3] - a[:3] @ b[:3])


def rotation_vector(now: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the shortest turn from one orientation (quaternion xyzw) to another: axis x radians,
    in the world's axes [3].
    """  # noqa: D205
    turn = multiply(wanted, now * [-1, -1, -1, 1])
    turn = turn if turn[3] >= 0 else -turn
    length = np.linalg.norm(turn[:3])
    return 2 * np.arctan2(length, turn[3]) * turn[:3] / max(length, 1e-9)
