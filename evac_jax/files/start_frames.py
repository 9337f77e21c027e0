"""Folders of start frames: their files, and how many starts they hold, told without loading any."""

from pathlib import Path

import numpy as np

from evac_jax.files import recordings

# Part of the name of RLinf's keyframe files, which end at the frame to start from.
KEYFRAME_MARK = "_kir"
# What a folder of packed starts holds.
IMAGES_FILE, POSES_FILE, TASKS_FILE, CARD_FILE = "images.npy", "poses.npy", "tasks.npy", "card.json"
STATES = "states"  # in the card: start ids of the ground truth, in the order of the frames


def keyframe_files(folder: str | Path) -> list[Path]:
    """Return RLinf's keyframe files in a folder, sorted."""
    return sorted(Path(folder).glob(f"*{KEYFRAME_MARK}*.npy"))


def episode_files(folder: str | Path) -> list[Path]:
    """Return RLinf's episode files in a folder, sorted; keyframes are none."""
    return sorted(set(Path(folder).glob("*.npy")) - set(keyframe_files(folder)))


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds packed starts rather than RLinf's files."""
    return (Path(folder) / IMAGES_FILE).is_file()


def count(kind: str, folder: str) -> int | None:
    """Return how many starts a source of initial states has; None where only it can tell.

    Args:
        kind: as of `env.initial_states`.
        folder: that it reads; one without usable files is left to the source to explain.

    Raises:
        DataError: the folder of a recording holds none.
    """
    if kind == "recording":
        return recordings.load(folder).split()[0].num_episodes
    if kind != "npy":
        return None
    if not is_packed(folder):
        return len(episode_files(folder)) or None
    try:
        return len(np.load(Path(folder) / TASKS_FILE, mmap_mode="r", allow_pickle=False)) or None
    except (OSError, ValueError, TypeError):
        return None
