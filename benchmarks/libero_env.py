r"""Measures LIBERO as ground truth: its speed, its memory, and whether it is upstream's LIBERO.

    python -m benchmarks.libero_env [--python .venv-libero/bin/python] [--episodes 4] [--tasks 1] \
        [--expert 0]

    episodes_per_hour   episodes of 220 actions in the fast setting (64 pixels of the table, drawn
                        only where the policy looks, three times as large and averaged), per hour
                        and core: from the processor time of LIBERO's process, so that other
                        programs on the machine count little. The scene is built before; each
                        process builds it once.
    equal_to_upstream   1 if frames, poses and success of the official protocol are bit for bit
                        those of upstream's own environment, over 20 actions; the episode is the
                        second one here and the first one there
    memory_gb           the most that one process has held, resident, in the fast setting
    suites              suites of which a task starts, plays 16 actions and shows a picture
    expert_success      with --expert N only: share of episodes in which the scripted expert
                        (`libero_expert`) succeeds, from N states of every task of libero_spatial

The last line has these figures, the machine's facts come before.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import libero_expert, machine
from evac_jax.config.libero import MAX_STEPS, LiberoConfig
from evac_jax.sim.libero_pool import LiberoPool
from evac_jax.tools.command_line import KINDS

ROOT = Path(__file__).parents[1]
CHUNK, ACTIONS = 8, 220
TABLE = (0.03, 0.99, 0.06, 0.86)
FAST = {"image_size": 64, "crop": TABLE, "oversample": 3, "reflections": False}
# As many different values as a picture of nothing never has.
COLOURS = 500


def wander(count: int, seed: int) -> np.ndarray:
    """Return actions [count 7] that move smoothly about, and close and open the gripper."""
    rng = np.random.default_rng(seed)
    phase, pace = rng.uniform(0, 2 * np.pi, 6), rng.uniform(0.05, 0.3, 6)
    moves = 0.4 * np.sin(phase + pace * np.arange(count)[:, None])
    gripper = np.where(np.arange(count) // 12 % 2, 1.0, -1.0)
    return np.concatenate((moves, gripper[:, None]), axis=1)


def upstream(config: LiberoConfig, start: int, actions: np.ndarray) -> dict[str, np.ndarray]:
    """Return what upstream's environment gives, see `libero_upstream`, from a start id."""
    pool = LiberoPool(config, 1)
    (task,), (state,) = pool.suite.locate(np.array([start]))
    pool.close()
    with tempfile.TemporaryDirectory() as folder:
        moves, out = Path(folder, "actions.npy"), Path(folder, "out.npz")
        np.save(moves, actions)
        seed = config.seed + state
        subprocess.run(
            [
                *(config.python, "-m", "benchmarks.libero_upstream", config.suite),
                *map(str, (task, state, seed, moves, out)),
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with np.load(out) as stored:
            return dict(stored)


def played(config: LiberoConfig, start: int, actions: np.ndarray) -> dict[str, np.ndarray]:
    """Return frames [n+1 H W 3], poses [n+1 8] and success [n] of the same actions played here.

    Another episode of the task comes first: a reset must leave nothing of it.
    """
    pool = LiberoPool(config, 1)
    try:
        pool.start([0], np.array([start + len(pool.suite.tasks)]))
        pool.play([0], [-actions[::-1]], [False])
        frames, poses = pool.start([0], np.array([start]))
        (rest,) = pool.play([0], [actions], [True])
    finally:
        pool.close()
    return {
        "frames": np.concatenate((frames, rest.frames))[:, 0],
        "poses": np.concatenate((poses, rest.poses)),
        "success": rest.success,
    }


def unlike(config: LiberoConfig, start: int, actions: np.ndarray) -> list[str]:
    """Return what differs between upstream's environment and the official protocol here."""
    theirs, ours = upstream(config, start, actions), played(config, start, actions)
    quaternion = theirs["quaternion"].astype(np.float32)
    # A rotation's quaternion has two signs; here the sign never jumps.
    signs = np.sign((quaternion * ours["poses"][:, 3:7]).sum(1, keepdims=True))
    opening = np.minimum(np.abs(theirs["fingers"]).sum(1) / 0.08, 1)
    pairs = {
        "frames": (theirs["frames"][:, ::-1, ::-1], ours["frames"]),
        "position": (theirs["position"].astype(np.float32), ours["poses"][:, :3]),
        "quaternion": (signs * quaternion, ours["poses"][:, 3:7]),
        "fingers": (opening.astype(np.float32), ours["poses"][:, 7]),
        "success": (theirs["success"][1:], ours["success"]),
    }
    return [name for name, (a, b) in pairs.items() if not np.array_equal(a, b)]


def starts(config: LiberoConfig, tasks: Sequence[int]) -> None:
    """Start tasks of a suite, play 16 actions each, and look at the pictures.

    Args:
        tasks: their numbers.

    Raises:
        ValueError: a picture shows nothing, or nothing moves.
    """
    pool = LiberoPool(config, 1)
    try:
        for task in tasks:
            before, _ = pool.start([0], np.array([task]))
            for part in np.split(wander(16, task), 2):
                (after,) = pool.play([0], [part], [False])
            for picture in (before[0, 0], after.frames[0, 0]):
                if len(np.unique(picture.reshape(-1, 3), axis=0)) < COLOURS:
                    raise ValueError(f"{pool.suite.tasks[task]}: its picture shows nothing")
            if np.array_equal(before[0], after.frames[0]):
                raise ValueError(f"{pool.suite.tasks[task]}: nothing moves")
    finally:
        pool.close()


def speed(config: LiberoConfig, episodes: int) -> tuple[float, float, float]:
    """Return episodes per hour and core, and the gigabytes that the process holds and held at most.

    The most is while it builds the scene.
    """
    pool = LiberoPool(config, 1)
    try:
        first = np.array([0])
        pool.start([0], first)  # builds the scene, compiles robosuite's functions
        pool.play([0], [wander(CHUNK, 0)], [False])
        (child,) = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        began = _processor_seconds(child)
        for episode in range(episodes):
            pool.start([0], first + episode * len(pool.suite.tasks))
            moves = wander(ACTIONS, episode)
            for at in range(0, ACTIONS, CHUNK):
                pool.play([0], [moves[at : at + CHUNK]], [False])
        seconds = _processor_seconds(child) - began
        status = Path(f"/proc/{child}/status").read_text()
    finally:
        pool.close()
    lines = (line.split() for line in status.splitlines() if line.endswith("kB"))
    sizes = {name: int(kilobytes) / 1e6 for name, kilobytes, _ in lines}
    return 3600 * episodes / seconds, sizes["VmRSS:"], sizes["VmHWM:"]


def _processor_seconds(process: str) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=str(ROOT / ".venv-libero/bin/python"), help="LIBERO's")
    parser.add_argument("--episodes", type=KINDS["count"], default=4, help="timed")
    parser.add_argument("--tasks", type=KINDS["count"], default=1, help="started of each suite")
    parser.add_argument(
        "--expert", type=KINDS["natural"], default=0, help="states of each task it plays"
    )
    args = parser.parse_args(argv)
    official = LiberoConfig(python=args.python)
    _say(str(machine.describe()))
    per_hour, held, peak = speed(dataclasses.replace(official, **FAST), args.episodes)
    _say(f"{per_hour:.0f} episodes an hour and core with {FAST}; holds {held:.2f} GB")
    differing = unlike(official, 0, wander(20, 0))
    _say(f"differs from upstream: {differing or 'nothing'}")
    for suite in MAX_STEPS:
        began, config = time.perf_counter(), dataclasses.replace(official, suite=suite)
        tasks = min(args.tasks, len(config.files.tasks(suite)))
        starts(config, range(tasks))
        _say(f"{suite}: {tasks} tasks, {time.perf_counter() - began:.0f} s")
    figures = {
        "episodes_per_hour": f"{per_hour:.0f}",
        "equal_to_upstream": int(not differing),
        "memory_gb": f"{peak:.2f}",
        "suites": len(MAX_STEPS),
    }
    if args.expert:
        config = dataclasses.replace(official, **FAST)
        found = libero_expert.expert_success(config, per_task=args.expert)
        figures["expert_success"] = f"{libero_expert.share(found):.4f}"
    _say(" ".join(f"{name}={value}" for name, value in figures.items()))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
