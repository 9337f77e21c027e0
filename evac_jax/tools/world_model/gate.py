"""Tells whether an autoencoder shows what success depends on, before a world model learns from it.

    python -m evac_jax.tools.world_model.gate --data DIR .. --autoencoder DIR

A world model can show no more than its autoencoder does. On held-out episodes of recordings that
tell where things are, this measures the PSNR of whole frames and that of squares whose side is a
quarter of the picture's: round the thing that is to be taken, while the hand holds it, and once it
is on its goal. And it trains two small networks to tell from one frame whether the task is done,
one on original, one on decoded frames. Each is judged on held-out frames of its own kind by its
balanced accuracy, the mean of the shares of frames that it tells right with and without success.
Frames just before and after a change of the label are left out. The last line has the figures.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from absl import logging
from torch import nn

from evac_jax.errors import DataError
from evac_jax.evac import model_folders
from evac_jax.files import cards, recordings
from evac_jax.files.atomic import whole_folder
from evac_jax.files.recordings import Episodes
from evac_jax.sim.reward import RewardConfig
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.reward import train as reward
from evac_jax.tools.reward.margin import near_change
from evac_jax.tools.world_model.places import project, squares

QUARTER = 1 / 8  # half the side of a square, as a share of the picture's width
# A thing is held while it is this much above where the episode found it, and this near to the
# hand, metres. A bowl that is held by its rim has its middle 6 cm from the hand.
LIFTED, IN_HAND = 0.02, 0.15
AT_ONCE = 256  # frames


def decode(data: Episodes, codec: nn.Module, device: str) -> Episodes:
    """Return the same episodes with frames that were encoded and decoded; other rows are black."""
    rows = rows_of(data)
    frames = np.zeros(data.frames.shape, np.uint8)  # rows that are not written take no memory
    for part in np.array_split(rows, len(rows) // AT_ONCE + 1):
        flat = torch.from_numpy(np.array(data.frames[part])).flatten(0, 1).to(device)
        seen = reward.through_codec(codec, reward.to_network(flat))
        seen = ((seen.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
        frames[part] = seen.cpu().numpy().reshape(len(part), *data.frames.shape[1:])
    return dataclasses.replace(data, frames=frames)


def rows_of(data: Episodes) -> np.ndarray:
    """Return the rows of all frames of the episodes, int64 [n]."""
    return np.concatenate([data.rows(n, np.arange(t + 1)) for n, t in enumerate(data.length)])


def moments(data: Episodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows with the taken thing in the hand, rows with it on its goal, and its places [F 3].

    Raises:
        DataError: the recording does not tell where it is.
    """
    place, rows = data.objects[:, recordings.OBJECTS.index("taken")], rows_of(data)
    if np.isnan(place[rows]).all():
        raise DataError(
            "no recording tells where the thing is that is to be taken (objects.npy); expected "
            "recordings of LIBERO, made by this version (docs/episodes.md)"
        )
    height = np.repeat(place[data.first, 2], data.length + 1)
    lifted = place[rows, 2] > height + LIFTED
    near = np.linalg.norm(place[rows] - data.poses[rows, :3], axis=1) < IN_HAND
    done = np.asarray(data.success[rows])
    return rows[lifted & near & ~done], rows[done], place


def psnr(data: Episodes, decoded: Episodes, rows: np.ndarray, place: np.ndarray | None) -> float:
    """Return the PSNR (dB) of frames `rows` in view 0, all together.

    Args:
        place: centres of the squares that count, metres [F 3]; None = whole frames.

    Raises:
        DataError: there are no such frames, or no square is in the picture.
    """
    total = count = 0.0
    for part in np.array_split(rows, len(rows) // AT_ONCE + 1):
        real, shown = (episodes.frames[part, 0].astype(np.float32) for episodes in (data, decoded))
        inside = np.ones(real.shape[:3], bool)
        if place is not None:
            camera = (np.repeat(m[:1], len(part), 0) for m in (data.intrinsic, data.c2w))
            inside = squares(project(place[part, None], *camera), real.shape[1:3], QUARTER)
        total += float((np.square(real - shown).mean(-1) * inside).sum())
        count += inside.sum()
    if not count:
        raise DataError(
            f"{data.num_episodes} held-out episodes show no thing in the hand, or none on its "
            "goal; record more"
        )
    return float(10 * np.log10(255**2 / max(total / count, 1e-6)))


def probe(training: Episodes, held_out: Episodes, args: argparse.Namespace) -> float:
    """Return the balanced accuracy of a new network on held-out frames of its own kind."""
    clear = ~reward.by_episode(held_out, near_change(held_out, *args.margin), empty=True)
    done = reward.by_episode(held_out, np.asarray(held_out.success))
    if not ((done & clear).any() and (~done & clear).any()):
        raise DataError("held-out frames are all with or all without success; record more episodes")
    count = len(training.instructions)
    net = reward.train(
        training,
        RewardConfig(width=args.width, num_instructions=count if count > 1 else 0),
        steps=args.steps,
        seed=args.seed,
        device=args.device,
        margin=args.margin,
        disturbed=False,
    )
    # Where both kinds are equally likely; in its batches success is rarer than failure.
    failures = 1 - reward.POSITIVES - (reward.OTHER_TASK if count > 1 else 0)
    said = reward.scores(net, held_out) > np.log(reward.POSITIVES / failures)
    return float(np.mean([said[done & clear].mean(), (~said[~done & clear]).mean()]))


def measure(data: Episodes, codec: nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Return the five figures."""
    training, held_out = data.numbered_as(data.asked).both_parts()
    rng = np.random.default_rng(args.seed)
    some = rng.permutation(training.num_episodes)[: args.episodes]
    training = training.select(np.sort(some))
    held, done, place = moments(held_out)
    shown = decode(held_out, codec, args.device)
    figures = {
        "psnr": psnr(held_out, shown, rows_of(held_out), None),
        "psnr_held": psnr(held_out, shown, held, place),
        "psnr_on_goal": psnr(held_out, shown, done, place),
    }
    logging.info("decoded %d held-out episodes: %s", held_out.num_episodes, figures)
    figures["probe_original"] = probe(training, held_out, args)
    figures["probe_decoded"] = probe(decode(training, codec, args.device), shown, args)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("world_model.gate", __doc__)
    add = parser.add_argument
    add("--data", required=True, nargs="+", help="folders of recorded episodes")
    add("--autoencoder", required=True, help="folder of the autoencoder")
    add("--out", type=Path, help="new folder for a card with the figures")
    add(
        "--episodes",
        type="count",
        default=400,
        help="largest number of those that train the networks",
    )
    add("--steps", type="count", default=1500, help="of the optimizer, for each network")
    add("--width", type="count", default=12, help="channels of their first stage")
    text = "frames left out on either side of a change of the label"
    add("--margin", type="natural", nargs=2, default=[3, 2], metavar=("BEFORE", "AFTER"), help=text)
    parser.add_device()
    parser.add_threads()
    parser.add_seed("the networks, and of which episodes train them")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    if args.out:
        refuse_existing(args.out)
    began = time.perf_counter()
    data = recordings.load(*args.data)
    codec = model_folders.load_model(args.autoencoder, kind="Autoencoder", device=args.device)
    weights = cards.sha256(model_folders.weights_file(args.autoencoder))
    figures = measure(data, codec, args)
    # First: they took long, and whatever keeps the card from being written, they are told.
    line = " ".join(f"{name}={value:.3f}" for name, value in figures.items())
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    if args.out:
        seconds = time.perf_counter() - began
        facts = cards.card(scores=figures, autoencoder=weights, seconds=seconds)
        with whole_folder(args.out) as folder:
            cards.write_json(folder / "card.json", facts)


if __name__ == "__main__":
    run_tool(main)
