"""A recording for the smallest world model (`tests/unit/evac/tiny.py`): noise, of any lengths."""

from pathlib import Path

import numpy as np

from evac_jax.evac import model_folders
from evac_jax.files.recordings import EpisodeWriter
from tests.unit.evac import tiny

LENGTHS = (3, 8, 5, 11)  # one to three chunks of 3, and what is left over


def write(
    folder: Path,
    *,
    count: int = 40,
    seed: int = 0,
    views: int = 1,
    sources: tuple[str, ...] = ("expert",),
    lengths: tuple[int, ...] = LENGTHS,
) -> Path:
    """Write `count` episodes, whose lengths and sources go round."""
    rng = np.random.default_rng(seed)
    camera = tiny.camera(views)
    with EpisodeWriter(
        folder,
        image_shape=(views, 32, 32, 3),
        instructions=["do it"],
        sources=list(sources),
        intrinsic=camera.intrinsic[0].numpy(),
        c2w=camera.c2w[0].numpy(),
        facts={"command": "a test"},
    ) as writer:
        for index in range(count):
            steps = lengths[index % len(lengths)]
            poses = np.zeros((steps + 1, 8), np.float32)
            poses[:, :3] = rng.normal(scale=0.05, size=(steps + 1, 3)).cumsum(0)
            poses[:, 6], poses[:, 7] = 1, rng.random(steps + 1)
            writer.add(
                frames=rng.integers(0, 256, (steps + 1, views, 32, 32, 3), dtype=np.uint8),
                actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
                poses=poses,
                success=np.zeros(steps + 1, bool),
                task=0,
                source=index % len(sources),
                start=index,
            )
    return folder


def write_model(folder: Path, views: int = 1) -> Path:
    """Write the tiny world model."""
    model_folders.save_model(folder, tiny.tiny_model(views))
    return folder
