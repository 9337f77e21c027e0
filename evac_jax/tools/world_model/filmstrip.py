r"""Draws held-out episodes as one picture: imagined frames above, real frames below.

The first frame and the poses are the same in both rows; the world model gets nothing else.

    python -m evac_jax.tools.world_model.filmstrip --world_model DIR --data DIR \
        --out imagined.png
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evac_jax.errors import DataError
from evac_jax.evac import model_folders
from evac_jax.files import recordings
from evac_jax.telemetry.video import filmstrip
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.world_model.imagine import check_steps, imagine_episodes

GAP = 6  # pixels between episodes


def compare(real: np.ndarray, imagined: np.ndarray, count: int, scale: int = 1) -> Image.Image:
    """Return one picture of episodes: `count` imagined frames above the real ones, for each.

    Args:
        real: uint8 [N T+1 V H W 3].
        imagined: uint8 [N T V H W 3], from the first real frame on.
        count: number of frames to show of each episode; views are side by side.
        scale: factor of enlargement.
    """
    strips, gaps = [], []
    for true, dreamt in zip(real, imagined, strict=True):
        films = (np.concatenate((true[:1], dreamt)), true)
        strips += [filmstrip(_side_by_side(film), count) for film in films]
        gaps += [1, GAP]
    page = stack(strips, [*gaps[:-1], 0])
    return page.resize((page.width * scale, page.height * scale), Image.NEAREST)


def _side_by_side(frames: np.ndarray) -> np.ndarray:
    """uint8 [T H V*W 3] of [T V H W 3]."""
    return np.concatenate(list(frames.swapaxes(0, 1)), 2)


def stack(strips: list[Image.Image], gaps: list[int]) -> Image.Image:
    """Return pictures of equal width one below another, with `gaps[i]` white pixels after each."""
    height = sum(strip.height for strip in strips) + sum(gaps)
    page = Image.new("RGB", (strips[0].width, height), "white")
    top = 0
    for strip, gap in zip(strips, gaps, strict=True):
        page.paste(strip, (0, top))
        top += strip.height + gap
    return page


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = Parser("world_model.filmstrip", __doc__)
    parser.add_argument("--world_model", required=True, help="folder of weights")
    parser.add_argument("--data", required=True, nargs="+", help="folders of episodes")
    parser.add_argument("--out", required=True, help="new PNG file")
    parser.add_argument(
        "--episodes", type="natural", nargs="+", default=[0, 1, 2], help="held-out ones"
    )
    parser.add_argument("--length", type="count", help="actions imagined; default: whole episodes")
    parser.add_argument("--frames", type="count", default=9, help="frames shown of each episode")
    parser.add_argument("--steps", type="count", default=3, help="denoising steps")
    parser.add_argument("--eta", type="share", default=1.0, help="denoising noise, 0..1")
    parser.add_argument("--scale", type="count", default=2, help="enlarge by")
    parser.add_device()
    parser.add_seed("the denoising noise")
    args = parser.parse_args(argv)
    refuse_existing(args.out)
    if Path(args.out).suffix.lower() != ".png":
        parser.error(f"--out: expected a name that ends in .png, got {args.out}")
    model = model_folders.load_model(args.world_model, kind="EvacModel", device=args.device)
    check_steps(model.config, args.steps, "--steps")
    _, held_out = recordings.load(*args.data).split()
    if max(args.episodes) >= held_out.num_episodes:
        raise DataError(
            f"--episodes: expected numbers below {held_out.num_episodes}, the held-out episodes of "
            f"--data, got {max(args.episodes)}"
        )
    chosen = held_out.select(np.array(args.episodes))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    imagined = imagine_episodes(
        model, chosen, steps=args.steps, eta=args.eta, generator=generator, length=args.length
    )
    real = chosen.stacked("frames", args.length)
    compare(real, imagined, args.frames, args.scale).save(args.out)


if __name__ == "__main__":
    run_tool(main)
