"""Imagines recorded episodes again with a world model and writes them as a new recording.

    python -m evac_jax.tools.world_model.imagine_dataset --world_model DIR --data DIR --out DIR

First frames, poses, actions and success are those of the real episode; all other frames are
imagined. A classifier that is trained on it learns what real success looks like in imagination,
including blur and ghost images. Failures that look like success in imagination are its hardest
negatives.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from absl import logging

from evac_jax.evac import model_folders
from evac_jax.evac.cpu.packed import accelerate
from evac_jax.evac.model import EvacModel
from evac_jax.files import cards, libero_facts, recordings
from evac_jax.files.recordings import Episodes, EpisodeWriter
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.world_model.imagine import check_steps, imagine_episodes

_BATCH = 32


def write(
    model: EvacModel, data: Episodes, out: str | Path, *, steps: int, eta: float, seed: int, **facts
) -> Episodes:
    """Imagine every episode into the new folder `out` and return the recording.

    Args:
        model: in eval mode.
        data: the real episodes, of any lengths.
        steps, eta: of the sampler; use the same values as in reinforcement learning.
        seed: of the noise.
        **facts: additional entries of the data card.

    Raises:
        DataError: the folder exists, or the pictures do not fit the model.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    # Whoever joins real and imagined episodes, or judges such ones, must know that they are alike.
    facts |= {"sampling": {"steps": steps, "eta": eta}, "libero": libero_facts.told(data.card)}
    with EpisodeWriter(
        out,
        image_shape=data.frames.shape[1:],
        instructions=data.instructions,
        sources=[f"imagined:{source}" for source in data.sources],
        intrinsic=data.intrinsic,
        c2w=data.c2w,
        facts=facts,
    ) as writer:
        for length in np.unique(data.length):
            same = np.flatnonzero(data.length == length)
            for first in range(0, len(same), _BATCH):
                part = data.select(same[first : first + _BATCH])
                imagined = imagine_episodes(model, part, steps=steps, eta=eta, generator=generator)
                actions, poses, success, frames = (
                    part.stacked(name) for name in ("actions", "poses", "success", "frames")
                )
                for n in range(part.num_episodes):
                    writer.add(
                        frames=np.concatenate((frames[n, :1], imagined[n])),
                        actions=actions[n, :-1],
                        poses=poses[n],
                        success=success[n],
                        task=int(part.task[n]),
                        source=int(part.source[n]),
                        start=int(part.start[n]),
                        held_out=bool(part.held_out[n]),  # as its recorder said
                    )
    return recordings.load(out)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("world_model.imagine_dataset", __doc__)
    parser.add_argument("--world_model", required=True, help="folder of weights")
    parser.add_argument("--data", required=True, nargs="+", help="folders of real episodes")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--episodes", type="natural", default=0, help="random ones; 0 = all")
    parser.add_argument("--steps", type="count", default=3, help="denoising steps")
    parser.add_argument("--eta", type="share", default=0.0, help="denoising noise, 0..1")
    parser.add_device()
    parser.add_threads()
    parser.add_seed("the denoising noise, and of which episodes are taken")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    refuse_existing(args.out)
    model = model_folders.load_model(Path(args.world_model), kind="EvacModel", device=args.device)
    check_steps(model.config, args.steps, "--steps")
    weights = model_folders.weights_file(args.world_model)
    facts = cards.card(world_model=cards.sha256(weights))
    source = recordings.load(*args.data)
    if args.episodes:
        order = np.random.default_rng(args.seed).permutation(source.num_episodes)
        source = source.select(np.sort(order[: args.episodes]))
    data = write(
        accelerate(model.float()),
        source,
        args.out,
        steps=args.steps,
        eta=args.eta,
        seed=args.seed,
        **facts,
    )
    logging.info("%d imagined episodes", data.num_episodes)


if __name__ == "__main__":
    run_tool(main)
