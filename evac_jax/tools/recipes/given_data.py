"""Checks the recordings that co-evolution begins with, before a round of training that needs them.

Fine-tuning the world model would refuse them too, but hours later.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evac_jax.errors import ConfigError, DataError
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model_folders import CONFIG_FILE
from evac_jax.files import cards, libero_facts, recordings
from evac_jax.miniature.render import camera
from evac_jax.tools.world_model.imagine import check_fits

RECORDED_PIXELS = 64  # of a side, in what the rounds record of the miniature


def check(world_model: Path, folders: Sequence[str], *, more_of_miniature: bool) -> None:
    """Compare recordings with the world model that is fine-tuned on them, and with each other.

    Args:
        world_model: folder of the one that the first round begins with.
        folders: of the recordings.
        more_of_miniature: the rounds add recordings of the miniature to them.

    Raises:
        ConfigError: the folder of the world model does not tell its sizes.
        DataError: a folder is no recording, pictures or cameras do not fit, or training or
            held-out episodes are missing.
    """
    config = _sizes(world_model)
    parts = {folder: recordings.load(folder) for folder in folders}  # joined, they would be copied
    whose, cameras = folders[0], (parts[folders[0]].intrinsic, parts[folders[0]].c2w)
    if more_of_miniature:
        whose = "the miniature, of which the rounds record more"
        intrinsic, c2w = camera(RECORDED_PIXELS)
        cameras = intrinsic[None], c2w[None]
    for folder, part in parts.items():
        try:
            check_fits(config, part)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error
        if not all(map(np.array_equal, (part.intrinsic, part.c2w), cameras)):
            raise DataError(
                f"{folder}: its cameras are not those of {whose}; give --data and --real_data that "
                "are recorded alike"
            )
    libero_facts.common([part.card for part in parts.values()])
    length = np.concatenate([part.length for part in parts.values()])
    kept = np.concatenate([part.held_out for part in parts.values()])
    training, held_out = (int(length[kept == side].max(initial=0)) for side in (False, True))
    if min(training, held_out) < config.chunk:
        raise DataError(
            f"--data: expected training and held-out episodes of at least {config.chunk} actions "
            f"(one chunk), the longest have {training} and {held_out}; record more episodes"
        )


def _sizes(world_model: Path) -> EvacConfig:
    try:
        return EvacConfig.from_dict(cards.read_json(world_model / CONFIG_FILE)["config"])
    except (OSError, KeyError) as error:
        raise ConfigError(
            f"config.world_model.checkpoint: expected the folder of a world model on this machine, "
            f"got {str(world_model)!r} ({error!r})"
        ) from error
