"""A world's folder whose parts are files of a few bytes, for all that only reads its card."""

import dataclasses
import hashlib
from pathlib import Path

from evac_jax.config.world import (
    CARD_FILE,
    PARTS,
    STARTS,
    Camera,
    Card,
    GroundTruth,
    Imagining,
    Judging,
    Policy,
    Starts,
)

CARD = Card(
    format=1,
    instructions=("push the dot",),
    cameras=(Camera((32, 32)),),
    chunk=8,
    action_repeat=1,
    horizon=24,
    gripper="none",
    ground_truth=GroundTruth("none"),
    imagining=Imagining(3, 0.5),
    judging=Judging(success_frames=2, judged_frames=4, threshold=0.4),
    policy=Policy("robot", prompt_length=17, temperature=0.7, keep_stop_token=True),
    starts=Starts("npy", (0, 80), (80, 90)),
    sha256={},
)
LIBERO = {
    "cameras": (Camera((64, 64), (0.1, 0.9, 0.2, 1.0)),),
    "action_repeat": 2,
    "ground_truth": GroundTruth(
        "libero", "libero_goal", (3,), True, oversample=2, reflections=False
    ),
}


def write(folder: Path, **changes) -> Path:
    """Write a world whose card has `changes`."""
    digests: dict[str, dict[str, str]] = {}
    for part in (*PARTS, STARTS):
        data = part.encode()
        (folder / part).mkdir(parents=True)
        (folder / part / "data.bin").write_bytes(data)
        digests[part] = {"data.bin": hashlib.sha256(data).hexdigest()}
    card = dataclasses.replace(CARD, **({"sha256": digests} | changes))
    (folder / CARD_FILE).write_text(card.to_json())
    return folder
