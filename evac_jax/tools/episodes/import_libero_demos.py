r"""Makes a recording out of LIBERO's published demonstrations, HDF5 files of one task each.

    python -m evac_jax.tools.episodes.import_libero_demos --source DIR --out DIR2 --camera libero
    python -m evac_jax.tools.episodes.import_libero_demos --source DIR --out DIR2 --render \
        --suite libero_spatial --image_size 256

The first takes the pictures as they are stored, of 128 pixels. The second renders MuJoCo's states
anew in LIBERO, as `make libero` installs it, plays the last action, and asks LIBERO itself which
frames are successes. With --no_noops actions that do nothing are left out, as in the public
fine-tuning data. Pictures are turned by 180 degrees, as policies see them. A demonstration is held
out by a hash of its first state and its instruction: however it is imported, it is on the same
side.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evac_jax.config.libero import LiberoConfig
from evac_jax.errors import ConfigError, DataError
from evac_jax.files import cards, meaning
from evac_jax.files.held_out import is_held_out
from evac_jax.files.recordings import EpisodeWriter
from evac_jax.sim.camera import Matrices
from evac_jax.sim.libero_pool import LiberoPool
from evac_jax.sim.libero_tasks import instruction_of
from evac_jax.tools.command_line import Parser, add_libero, libero_of, run_tool
from evac_jax.tools.episodes import importing
from evac_jax.tools.episodes.libero_demos import SUFFIX, Demo, read_demos, task_of, without_no_ops

Make = Callable[[str, Demo], dict[str, np.ndarray]]  # task and demonstration in, episode out


def render(pool: LiberoPool, task: str, demo: Demo) -> dict[str, np.ndarray]:
    """Return the episode that MuJoCo's states show, and the frame after the last action.

    Raises:
        DataError: the suite has no such task, or its states have another length.
    """
    suite = pool.suite
    if task not in suite.tasks:
        raise DataError(f"{demo.where}: {suite.name} has no task {task!r}; choose another --suite")
    length = suite.states[suite.tasks.index(task)].shape[1]
    if demo.states.shape[1] != length:
        raise DataError(
            f"{demo.where}: states of {demo.states.shape[1]} numbers, {suite.name} has {length}; "
            "the file is for another version of LIBERO: take its pictures as stored"
        )
    shown = pool.show(task, demo.states, demo.fixtures)
    last = pool.play([0], [demo.actions[-1:]], [True])[0]
    joined = {
        name: np.concatenate((getattr(shown, name), getattr(last, name)))
        for name in ("frames", "poses", "success")
    }
    return joined | {"actions": demo.actions}


def write(
    args: argparse.Namespace,
    files: Sequence[Path],
    size: int,
    camera: Matrices,
    make: Make,
    **more_facts: Any,
) -> int:
    """Write the recording, `more_facts` into its card; return the number of episodes."""
    texts = [instruction_of(task_of(path)) for path in files]
    instructions = list(dict.fromkeys(texts))
    facts = {"demonstrations": args.source.name, "rendered": args.render, "no_noops": args.no_noops}
    count = 0
    with EpisodeWriter(
        args.out,
        image_shape=(1, size, size, 3),
        instructions=instructions,
        sources=[args.name],
        intrinsic=camera[0],
        c2w=camera[1],
        facts=cards.card(**facts, **more_facts),
    ) as writer:
        for path, text in zip(files, texts, strict=True):
            for demo in read_demos(path):
                episode = make(task_of(path), demo)
                if args.no_noops:
                    episode = without_no_ops(episode)
                if not len(episode["actions"]):
                    raise DataError(f"{demo.where}: every action is without motion")
                meaning.check_deltas(episode["actions"], episode["poses"], demo.where)
                episode["frames"] = importing.resize(episode["frames"], size)
                writer.add(
                    **episode,
                    task=instructions.index(text),
                    source=0,
                    held_out=is_held_out(demo.states[0], text),
                )
                count += 1
    return count


def run(args: argparse.Namespace) -> int:
    """Import as told; return the number of episodes.

    Raises:
        ConfigError: options that do not go together, or LIBERO is not there.
        DataError: a file that does not fit.
    """
    files = sorted(args.source.glob(f"*{SUFFIX}"))
    if not files:
        raise DataError(f"--source={args.source}: expected files named <task>{SUFFIX}, found none")
    stored = next(read_demos(files[0])).frames.shape[1:3]
    if not args.render:
        drawing, names = LiberoConfig(), ("crop", "oversample", "reflections")
        if any(getattr(args, name) != getattr(drawing, name) for name in names):
            raise ConfigError(
                "--crop, --oversample, --no-reflections: only with --render, which draws the "
                "pictures"
            )
        if not args.camera:
            raise ConfigError("--camera: needed, unless --render asks LIBERO where its camera is")
        size = args.image_size or stored[0]
        camera = importing.read_camera(args.camera, 1, stored, size)
        return write(args, files, size, camera, lambda _, demo: demo.stored())
    if args.camera:
        raise ConfigError("--camera: not with --render, which asks LIBERO where its camera is")
    config = libero_of(args, image_size=args.image_size or stored[0])
    pool = LiberoPool(config, 1)
    try:
        pool.start([0], np.array([0]))  # tells where the camera is

        def make(task: str, demo: Demo) -> dict[str, np.ndarray]:
            episode = render(pool, task, demo)
            if not pool.one_camera:
                raise DataError(
                    f"{demo.where}: the camera is not where it is in {pool.suite.tasks[0]}; import "
                    "tasks with cameras in different places apart"
                )
            return episode

        size, facts = config.image_size, config.facts()
        return write(args, files, size, pool.camera, make, libero=facts)
    finally:
        pool.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("episodes.import_libero_demos", __doc__)
    add = parser.add_argument
    add("--source", required=True, type=Path, help=f"folder of <task>{SUFFIX}")
    add("--out", required=True, help="new folder for the recording")
    add("--name", default="demonstration", help="who played; the source of the episodes")
    parser.add_image_size()
    add("--no_noops", action="store_true", help="leave out actions that do nothing")
    add(
        "--camera",
        default="",
        help='of stored pictures: libero, or a JSON file with "intrinsic" [1 3 3], "c2w" [1 4 4] '
        'and "size" [H, W] that the intrinsics are for',
    )
    add("--render", action="store_true", help="render the states in LIBERO")
    add_libero(parser)  # for --render
    importing.finish(run, parser.parse_args(argv))


if __name__ == "__main__":
    run_tool(main)
