"""Trains a small image autoencoder for a world model of small frames.

The full-size model uses the published autoencoder. A 64-pixel miniature needs its own, which must
encode both camera frames and trajectory maps. The same command continues a run that was stopped.

    python -m evac_jax.tools.world_model.train_autoencoder --data DIR --out DIR --steps 2000
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from absl import logging
from torch import Tensor

from evac_jax.evac import model_folders
from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.config import EvacConfig
from evac_jax.files import cards, claim, recordings
from evac_jax.files.recordings import Episodes
from evac_jax.tools import sizes, torch_training
from evac_jax.tools.command_line import Parser, run_tool
from evac_jax.tools.finite import check_finite
from evac_jax.tools.resume import check_folder
from evac_jax.tools.world_model.imagine import camera_of, check_fits, to_images
from evac_jax.tools.world_model.latent_cache import draw_pose_maps
from evac_jax.tools.world_model.places import places, squares

MAP_SHARE = 0.25  # of a batch; maps are simple pictures, but their discs must be exactly in place
KL_WEIGHT = 1e-6
DIFFERENT = 0.1  # from the background, in the range of -1 to 1: such pixels are foreground
# The posterior of a new network has a noise of .97 beside means that spread by .18, and a training
# would spend its first thousand steps on that. It begins with this log variance instead, which
# hardly depends on the picture, and with means that spread more.
START_LOGVAR, START_LOGVAR_SLOPE, START_MEAN_SLOPE = -8.0, 0.1, 4.0
LATENT_NOISE = 0.3  # of the latents' standard deviation; the denoiser's latents are not exact
# A linear map of the latents must predict how each cell's colour differs from the background's.
# Without it, a block's colour makes up 2 to 6 % of the variance of the latents (47 % in pictures).
# The loss of a world model is measured in latents, so blocks would change their colour.
COLOR_WEIGHT = 0.5
PROGRESS = "progress.pt"
# Arguments that must be the same when a run is resumed.
SETUP = (
    *("steps", "batch", "lr", "seed", "dtype"),
    *("foreground", "object_weight", "square_error"),
)


@dataclass(frozen=True)
class Pictures:
    """Frames, then trajectory maps, of random rows and views.

    Attributes:
        images: [N, 3, H, W] in [-1, 1].
        views: int64 [N].
        near: which pixels of the frames are near the hand or a thing whose place the recording
            tells, bool [num_frames, 1, H, W].
        num_frames: how many of them are frames.
    """

    images: Tensor
    views: np.ndarray
    near: Tensor
    num_frames: int


def draw_pictures(
    data: Episodes, config: EvacConfig, size: int, rng: np.random.Generator, device
) -> Pictures:
    """Draw `size` pictures, every episode and every one of its steps equally often."""
    num_frames = size - int(size * MAP_SHARE)
    episodes = rng.integers(data.num_episodes, size=size)
    rows = data.rows(episodes, rng.integers(data.length[episodes] + 1))
    views = rng.integers(data.frames.shape[1], size=size)
    frames = to_images(data.frames[rows[:num_frames], views[:num_frames]], device)
    poses = torch.from_numpy(np.array(data.poses[rows[num_frames:]])).to(device)
    maps = draw_pose_maps(poses, camera_of(data, device), config)
    maps = maps[torch.arange(len(maps)), torch.from_numpy(views[num_frames:])]
    near = squares(places(data, rows[:num_frames], views[:num_frames]), config.image_size)
    near = torch.from_numpy(near)[:, None].to(device)
    return Pictures(torch.cat((frames, maps)), views, near, num_frames)


def pixel_weight(
    frames: Tensor, background: Tensor, near: Tensor, foreground: float, objects: float
) -> Tensor:
    """Weight of every pixel, [N, 1, H, W], mean 1.

    Args:
        frames, background: [N, 3, H, W] in [-1, 1].
        near: bool [N, 1, H, W], see `Pictures`.
        foreground: added where a frame differs from its background.
        objects: added where `near` is true.
    """
    different = (frames - background).abs().amax(1, keepdim=True) > DIFFERENT
    weight = 1 + foreground * different + objects * near
    return weight / weight.mean()


@torch.no_grad()
def start_posterior(model: Autoencoder) -> None:
    """Let a new model begin with little noise beside means that differ; see `START_LOGVAR`."""
    last, channels = model.kl.quant_conv, model.config.latent_channels
    last.bias[channels:] = START_LOGVAR
    last.weight[channels:] *= START_LOGVAR_SLOPE
    last.weight[:channels] *= START_MEAN_SLOPE


def backgrounds(data: Episodes, config: EvacConfig, seed: int, device) -> Tensor:
    """Median frame of each view, [V, 3, H, W], of 192 frames."""
    drawn = draw_pictures(data, config, 256, np.random.default_rng((seed, 0)), device)
    frames, views = drawn.images[: drawn.num_frames], drawn.views[: drawn.num_frames]
    medians = []
    for view in range(data.frames.shape[1]):
        of_view = frames[torch.from_numpy(views == view)]
        medians.append(of_view.median(0).values if len(of_view) else frames.median(0).values)
    return torch.stack(medians)


def train(data: Episodes, config: EvacConfig, args: argparse.Namespace, setup: dict[str, Any]):
    """Return the trained autoencoder and the reconstruction error of its last 100 steps.

    Raises:
        TrainingError: loss or gradient is not finite.
    """
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = Autoencoder(config.autoencoder)
    start_posterior(model)
    model = model.to(device, memory_format=torch.channels_last)
    colors = torch.nn.Conv2d(config.autoencoder.latent_channels, 3, 1).to(device)
    both = torch.nn.ModuleList((model, colors))
    optimizer = torch.optim.AdamW(both.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    ema = torch_training.Ema(model, 0.995)
    background = backgrounds(data, config, args.seed, device)
    errors: list[float] = []
    done, progress = 0, Path(args.out) / PROGRESS
    if progress.exists():
        state = torch_training.load_progress(progress, setup, device)
        torch_training.load_trainable(both, state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        done, errors = state["step"], state["errors"]
        logging.info("resumed at step %d", done)
    advice = (
        f"Nothing of it was saved; remove {progress} if it is there, and try a lower --lr "
        f"({args.lr:g}) or --dtype float32"
    )
    began = time.perf_counter()
    for step in range(done, args.steps):
        # The step is the seed of all random numbers, so a resumed run repeats an uninterrupted one;
        # 0 is the seed of the background.
        rng = np.random.default_rng((args.seed, step + 1))
        torch.manual_seed(args.seed * 1_000_003 + step)
        torch_training.set_lr(
            optimizer, torch_training.cosine_lr(step, args.steps, args.lr, warmup=100)
        )
        drawn = draw_pictures(data, config, args.batch, rng, device)
        loss, error = _loss(model, colors, drawn, background, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        figures = {"loss": float(loss.detach()), "norm_of_the_gradient": float(norm)}
        check_finite(step + 1, advice, **figures)
        optimizer.step()
        ema.update(model)
        errors = [*errors[-99:], float(error.detach())]
        if (step + 1) % 100 == 0:
            rate = (step + 1 - done) / (time.perf_counter() - began)
            mean = np.mean(errors)
            logging.info("step %d/%d  error %.4f  %.2f/s", step + 1, args.steps, mean, rate)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {
                "setup": setup,
                "parameters": torch_training.trainable_state(both),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": step + 1,
                "errors": errors,
            }
            torch_training.save_progress(progress, state)
    ema.swap(model)
    return model.eval(), float(np.mean(errors))


def _loss(
    model: Autoencoder,
    colors: torch.nn.Conv2d,
    drawn: Pictures,
    background: Tensor,
    args: argparse.Namespace,
):
    """Loss, and the weighted mean absolute error in it."""
    images, count = drawn.images, drawn.num_frames
    with torch_training.autocast(images.device, args.dtype):
        mean, logvar = model.encode(images.to(memory_format=torch.channels_last))
    mean, logvar = mean.float(), logvar.float()
    spread = mean.detach().std()
    noise = LATENT_NOISE * spread + (0.5 * logvar).exp()
    latents = mean + noise * torch.randn_like(mean)
    with torch_training.autocast(images.device, args.dtype):
        decoded = model.decode(latents)
    own = background[torch.from_numpy(drawn.views[:count]).to(background.device)]
    weight = torch.ones_like(images[:, :1])
    weight[:count] = pixel_weight(
        images[:count], own, drawn.near, args.foreground, args.object_weight
    )
    off = decoded.float() - images
    error = (weight * off.abs()).mean()
    square = (weight * off.square()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    different = torch.cat((images[:count] - own, images[count:]))
    per_cell = F.adaptive_avg_pool2d(weight, mean.shape[-2:])
    cells = F.adaptive_avg_pool2d(weight * different, mean.shape[-2:]) / per_cell
    color = (per_cell * (colors(latents / spread) - cells).square()).mean()
    return error + args.square_error * square + COLOR_WEIGHT * color + KL_WEIGHT * kl, error


@torch.inference_mode()
def score(model: Autoencoder, data: Episodes, config: EvacConfig, seed: int) -> dict[str, float]:
    """PSNR in dB of frames and maps, and the latents' standard deviation, on 512 pictures."""
    device = next(model.parameters()).device
    drawn = draw_pictures(data, config, 512, np.random.default_rng(seed), device)
    images, count = drawn.images, drawn.num_frames
    mean = torch.cat([model.encode(part)[0] for part in images.split(64)])
    decoded = torch.cat([model.decode(part) for part in mean.split(64)]).clamp(-1, 1)

    def psnr(a: Tensor, b: Tensor) -> float:
        return float(10 * torch.log10(4 / (a - b).square().mean()))

    return {
        "psnr_frames": psnr(decoded[:count], images[:count]),
        "psnr_maps": psnr(decoded[count:], images[count:]),
        "latent_std": float(mean[:count].std()),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = Parser("world_model.train_autoencoder", __doc__)
    parser.add_argument("--data", required=True, nargs="+", help="folders of episodes")
    parser.add_argument("--out", required=True, help="folder for the autoencoder and its card")
    parser.add_argument(
        *("--sizes", "--config"),
        default=sizes.DEFAULT,
        metavar="NAME|FILE",
        help=f"{sizes.HELP} an EvacConfig",
    )
    parser.add_argument("--steps", type="count", default=2000, help="of the optimizer")
    parser.add_argument("--batch", type="count", default=32, help="pictures per step")
    parser.add_argument("--lr", type="positive", default=2e-3, help="highest learning rate")
    parser.add_argument("--save_every", type="count", default=500, help="steps between saves")
    text = "more weight of pixels unlike the background"
    parser.add_argument("--foreground", type="not_negative", default=4.0, help=text)
    text = "more weight round the hand and things"
    parser.add_argument("--object_weight", type="not_negative", default=0.0, help=text)
    text = "of squares beside absolute differences"
    parser.add_argument("--square_error", type="not_negative", default=0.0, help=text)
    parser.add_argument(
        "--dtype", choices=tuple(torch_training.DTYPES), default="float32", help="of the networks"
    )
    parser.add_device()
    parser.add_threads()
    parser.add_seed("weights and batches")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    check_folder(out, PROGRESS)
    with claim.written_alone(out):  # two runs would write one progress
        run(out, args)


def run(out: Path, args: argparse.Namespace) -> None:
    """Train as the arguments say; write the autoencoder and its card."""
    data = recordings.load(*args.data)
    config = sizes.world_model(args.sizes).replace(n_view=data.frames.shape[1])
    check_fits(config, data)
    train_part, held_out = data.both_parts()
    out.mkdir(parents=True, exist_ok=True)
    digests = [cards.sha256(Path(folder) / "card.json") for folder in args.data]
    setup = {name: getattr(args, name) for name in SETUP}
    setup |= {"config": config.to_dict(), "data": digests}
    began = time.perf_counter()
    model, error = train(train_part, config, args, setup)
    scores = score(model, held_out, config, args.seed)
    # Latents are scaled to unit standard deviation, which the denoiser's noise also has.
    scale_factor = round(1 / scores["latent_std"], 5)
    model.config = config.autoencoder.replace(scale_factor=scale_factor)
    model_folders.save_model(out, model)
    facts = cards.card(
        data=digests,
        scores=scores,
        train_error=error,
        seconds=time.perf_counter() - began,
        sha256={model_folders.WEIGHTS_FILE: cards.sha256(out / model_folders.WEIGHTS_FILE)},
    )
    cards.write_json(out / "card.json", facts)
    logging.info("held-out: %s", scores)


if __name__ == "__main__":
    run_tool(main)
