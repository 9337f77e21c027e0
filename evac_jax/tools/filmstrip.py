"""One picture of held-out episodes: what the world model imagines above, what happened below.

Both rows follow the same poses from the same first frame; the world model sees nothing else.

    python -m evac_jax.tools.filmstrip --world_model DIR --data DIR --out docs/imagined.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evac_jax.evac import checkpoint
from evac_jax.sim.env import to_uint8
from evac_jax.telemetry.video import filmstrip
from evac_jax.tools import episodes
from evac_jax.tools.train_world_model import imagine_episodes

GAP = 6  # pixels between episodes


def stack(strips: list[Image.Image], gaps: list[int]) -> Image.Image:
    """Return pictures of equal width one below the other, `gaps[i]` white pixels after each."""
    height = sum(strip.height for strip in strips) + sum(gaps)
    page = Image.new("RGB", (strips[0].width, height), "white")
    top = 0
    for strip, gap in zip(strips, gaps, strict=True):
        page.paste(strip, (0, top))
        top += strip.height + gap
    return page


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world_model", required=True)
    parser.add_argument("--data", required=True, help="folder of evac_jax.tools.collect")
    parser.add_argument("--out", required=True, help="PNG file")
    parser.add_argument("--episodes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=9, help="frames shown of each episode")
    parser.add_argument("--steps", type=int, default=3, help="denoising steps")
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--scale", type=int, default=2, help="enlarge by")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = checkpoint.load_model(Path(args.world_model), kind="EvacModel")
    _, held_out = episodes.load(args.data).split()
    rows = np.array(args.episodes)
    chosen = held_out[rows]
    generator = torch.Generator().manual_seed(args.seed)
    imagined = to_uint8(
        imagine_episodes(model, chosen, steps=args.steps, eta=args.eta, generator=generator)
    ).numpy()
    strips, gaps = [], []
    for index in range(len(rows)):
        real = np.asarray(chosen.frames[index])
        film = np.concatenate((real[:1], imagined[index]))
        strips += [filmstrip(film, args.frames), filmstrip(real, args.frames)]
        gaps += [1, GAP]
    page = stack(strips, [*gaps[:-1], 0])
    page = page.resize((page.width * args.scale, page.height * args.scale), Image.NEAREST)
    page.save(args.out)


if __name__ == "__main__":
    main()
