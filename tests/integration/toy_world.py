"""A toy world that is not shipped: a dot that actions move, and two coloured squares to push it to.

Its recording is all that a user of docs/own_simulator.md brings besides a start policy.
"""

from pathlib import Path

import numpy as np

from evac_jax.files.recordings import EpisodeWriter

SIZE, STEPS, EPISODES = 64, 16, 40
INSTRUCTIONS = ("push the dot to the red square", "push the dot to the blue square")
COLORS = np.array([[200, 40, 40], [40, 40, 200]], np.uint8)
REACH, STEP, METRES = 8.0, 5.0, 0.005  # pixels; pixels of a whole action; metres of a pixel
NOISE = 0.3


def _draw(dot: np.ndarray, squares: np.ndarray) -> np.ndarray:
    frame = np.full((SIZE, SIZE, 3), 120, np.uint8)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for square, color in zip(squares, COLORS, strict=True):
        frame[np.maximum(abs(columns - square[0]), abs(rows - square[1])) <= 5] = color
    frame[np.hypot(columns - dot[0], rows - dot[1]) <= 4] = (240, 240, 60)
    return frame


def write(folder: Path) -> None:
    """Write episodes. Hardly anybody finds the blue square, so even a classifier of pictures from
    a world model that learned next to nothing tells success by the instruction.
    """
    rng = np.random.default_rng(0)
    focal = SIZE * 1.0
    intrinsic = [[[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]]]
    c2w = np.eye(4)[None].copy()
    c2w[0, 2, 3] = -SIZE * METRES  # the plane of the dot fills the picture
    with EpisodeWriter(
        folder,
        image_shape=(1, SIZE, SIZE, 3),
        instructions=INSTRUCTIONS,
        sources=["skilled", "random"],
        intrinsic=np.array(intrinsic),
        c2w=c2w,
        facts={"command": "a toy"},
    ) as writer:
        for number in range(EPISODES):
            task = number % 2
            lost = task == 1 and number % 8 != 1
            dot, squares = np.array([32.0, 32.0]), np.array([[14.0, 0.0], [50.0, 0.0]])
            squares[:, 1] = rng.uniform(12, 52, 2)
            frames, actions, poses, success = [], [], [], []
            for step in range(STEPS + 1):
                away = squares[task] - dot
                frames.append(_draw(dot, squares)[None])
                poses.append([*((dot - SIZE / 2) * METRES), 0, 0, 0, 0, 1, 1])
                success.append(np.hypot(*away) < REACH)
                if step < STEPS:
                    aim = rng.uniform(-1, 1, 2) if lost else np.clip(away / STEP, -1, 1)
                    move = np.clip(aim + NOISE * rng.normal(size=2), -1, 1)
                    actions.append([*move, 0, 0, 0, 0, -1])
                    dot = np.clip(dot + STEP * move, 4, SIZE - 5)
            writer.add(
                frames=np.array(frames),
                actions=np.array(actions),
                poses=np.array(poses),
                success=np.array(success),
                task=task,
                source=int(lost),
                held_out=number >= EPISODES - 8,
            )
