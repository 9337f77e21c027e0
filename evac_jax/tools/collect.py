"""Records scripted episodes of the tabletop for training the world model and its helpers.

    python -m evac_jax.tools.collect --out DIR --episodes 2000 --seed 0 \
        --mix noisy=0.18,near_miss=0.37,random_midway=0.17,random=0.10,sloppy=0.18

More than half of the default mixture fails: a world model that has only seen success imagines
success. The recording is a pure function of its arguments.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from evac_jax.errors import DataError
from evac_jax.miniature import scene as world
from evac_jax.miniature.expert import KINDS, Expert, demonstrate
from evac_jax.miniature.render import camera, render
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.tools import episodes
from evac_jax.tools.episodes import Episodes

DEFAULT_MIX = {
    "noisy": 0.18,
    "near_miss": 0.37,
    "random_midway": 0.17,
    "random": 0.10,
    "sloppy": 0.18,
}
STEPS = 32  # an episode of the miniature: 4 chunks of 8
FIRST_SCENE = 10_000_000  # scene seeds of recordings, above all that RL trains or evaluates on
SCENES_PER_SEED = 1_000_000
_BATCH = 64  # episodes played at once


def collect(
    out: str | Path,
    num_episodes: int,
    mix: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    steps: int = STEPS,
    image_size: int = 64,
) -> Episodes:
    """Record episodes into the new folder `out` and return them.

    Args:
        out: appears only when the recording is complete.
        num_episodes: of all kinds together; shares are rounded to whole episodes.
        mix: kind of player (see `expert.KINDS`) -> share; shares are divided by their sum.
        seed: recordings of different seeds share no scene.
        steps: actions per episode.
        image_size: pixels.

    Raises:
        DataError: the folder exists, or the mixture is not one.
    """
    out = Path(out)
    mix = dict(DEFAULT_MIX if mix is None else mix)
    if out.exists():
        raise DataError(f"{out} exists; choose another --out or remove it")
    if unknown := sorted(set(mix) - set(KINDS)):
        raise DataError(f"--mix: no such kind {unknown}; there are {KINDS}")
    if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise DataError(f"--mix: expected shares that are positive in sum, got {mix}")
    if not 1 <= num_episodes <= SCENES_PER_SEED:
        raise DataError(f"--episodes: expected 1..{SCENES_PER_SEED}, got {num_episodes}")

    began = time.perf_counter()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    arrays = episodes.create(partial, num_episodes, steps, image_size)
    arrays["intrinsic"][:], arrays["c2w"][:] = camera(image_size)
    counts = _counts(mix, num_episodes)
    # Sources are spread over the file, so that any part of it has the whole mixture.
    rng = np.random.default_rng([seed, len(KINDS)])
    rows = np.split(rng.permutation(num_episodes), np.cumsum(list(counts.values()))[:-1])
    scene_seeds = FIRST_SCENE + seed * SCENES_PER_SEED + np.arange(num_episodes)
    for kind, rows_of_kind in zip(counts, rows, strict=True):
        for first in range(0, len(rows_of_kind), _BATCH):
            part = np.sort(rows_of_kind[first : first + _BATCH])
            player = Expert(kind, np.random.default_rng([seed, KINDS.index(kind), first]))
            _record(arrays, part, world.sample_scenes(scene_seeds[part]), player, steps, image_size)
            arrays["source"][part] = list(counts).index(kind)
    success = {
        kind: float(arrays["success"][rows_of_kind].any(1).mean()) if len(rows_of_kind) else 0.0
        for kind, rows_of_kind in zip(counts, rows, strict=True)
    }
    for array in arrays.values():
        array.flush()
    meta = {
        "command": " ".join(["python -m evac_jax.tools.collect", *_arguments(num_episodes, mix)])
        + f" --seed {seed} --steps {steps} --image-size {image_size}",
        "seed": seed,
        "scene_seeds": [int(scene_seeds[0]), int(scene_seeds[-1])],
        "sources": list(counts),
        "episodes": counts,
        "success_once": success,
        "steps": steps,
        "instructions": list(INSTRUCTIONS),
        "pose": "xyz in metres, quaternion xyzw, gripper opening 0..1",
        "action": "delta_ee_7 in [-1, 1]; gripper -1 opens, +1 closes",
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        "seconds": round(time.perf_counter() - began, 1),
        "sha256": episodes.digests(partial),
    }
    (partial / episodes.META).write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(partial, out)
    return episodes.load(out)


def _record(arrays, rows, scenes, player, steps, image_size) -> None:
    actions, states = demonstrate(scenes, player, steps)
    arrays["actions"][rows] = actions
    arrays["task"][rows] = scenes.task
    for t, state in enumerate(states):
        arrays["frames"][rows, t] = render(state, image_size)
        arrays["poses"][rows, t] = state.pose
        arrays["success"][rows, t] = world.is_success(state)


def _counts(mix: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole episodes per kind, `total` together, each within one of its share."""
    edges = np.rint(np.cumsum(list(mix.values())) / sum(mix.values()) * total).astype(int)
    return dict(zip(mix, np.diff(edges, prepend=0).tolist(), strict=True))


def _arguments(num_episodes: int, mix: Mapping[str, float]) -> list[str]:
    shares = ",".join(f"{kind}={share:g}" for kind, share in mix.items())
    return ["--out DIR", f"--episodes {num_episodes}", f"--mix {shares}"]


def parse_mix(text: str) -> dict[str, float]:
    """Return {"noisy": 0.3, ...} for "noisy=0.3,..."."""
    try:
        pairs = [entry.split("=") for entry in text.split(",")]
        return {kind.strip(): float(share) for kind, share in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected kind=share,..., got {text!r}") from error


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--mix", type=parse_mix, default=DEFAULT_MIX, help="kind=share,...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--image-size", type=int, default=64)
    args = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    data = collect(
        args.out,
        args.episodes,
        args.mix,
        seed=args.seed,
        steps=args.steps,
        image_size=args.image_size,
    )
    logging.info("%d episodes; success by source: %s", data.num_episodes, data.meta["success_once"])


if __name__ == "__main__":
    main()
