"""What a world is packed from in these tests: small networks, and a recording of plain frames."""

import json
from pathlib import Path

import numpy as np

from evac_jax.files.recordings import EpisodeWriter
from evac_jax.miniature.tasks import INSTRUCTIONS

PARTS = ("world_model", "reward", "pose_model", "policy")
# What no file of the smallest weights tells.
TOLD = (
    *("--horizon", "16", "--ground_truth", "none", "--gripper", "libero"),
    *("--keep_stop_token", "no", "--success_frames", "2", "--judged_frames", "2"),
    *("--threshold", "0.5", "--steps", "1", "--eta", "0"),
)
LIBERO = {
    "suite": "libero_goal",
    "image_size": 64,
    "crop": [0.1, 0.9, 0.0, 1.0],
    "oversample": 2,
    "reflections": False,
    "action_repeat": 2,
}


def record(folder: Path, *, size=64, instructions=INSTRUCTIONS, episodes=5, **facts) -> Path:
    """Write short episodes, the first and last held out. Frame n is all of shade 10 (n + 1).

    Episode n began in state 100 + n of its ground truth.
    """
    with EpisodeWriter(
        folder,
        image_shape=(1, size, size, 3),
        instructions=instructions,
        sources=["a test"],
        intrinsic=np.eye(3)[None],
        c2w=np.eye(4)[None],
        facts=facts,
    ) as writer:
        for number in range(episodes):
            writer.add(
                frames=np.full((3, 1, size, size, 3), 10 * (number + 1), np.uint8),
                actions=np.zeros((2, 7)),
                poses=np.tile([0.1, 0, 0.2, 0, 0, 0, 1, 1.0], (3, 1)),
                success=np.zeros(3, bool),
                task=number % len(instructions),
                source=0,
                start=100 + number,
                held_out=number in (0, episodes - 1),
            )
    return folder


def of(weights: Path, **others: Path) -> list[str]:
    """Options that name the parts."""
    folders = {part: others.get(part, weights / part) for part in PARTS}
    return [word for part, folder in folders.items() for word in (f"--{part}", str(folder))]


def with_card(source: Path, out: Path, **facts) -> Path:
    """Copy a part with more facts in its card."""
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    path = out / "card.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(card | facts))
    return out
