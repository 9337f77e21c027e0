"""Trains a small image autoencoder for a world model of small frames.

The full-size model uses the published one; a 64-pixel miniature needs its own, which must code
camera frames and trajectory maps alike.

    python -m evac_jax.tools.train_autoencoder --data DIR --out DIR --steps 2000
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from absl import logging
from torch import Tensor

from evac_jax.evac import checkpoint
from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.trajectory_maps import draw_maps, normalize_maps
from evac_jax.miniature.sizes import WORLD_MODEL
from evac_jax.tools import cards, episodes, training

MAP_SHARE = 0.25  # of a batch; maps are simple pictures, but their discs must sit exactly
KL_WEIGHT = 1e-6
FOREGROUND_WEIGHT = 4.0  # blocks and gripper cover few pixels; without it they come out blurred
LATENT_NOISE = 0.05  # of the latents' own spread: the denoiser's latents will not be exact


def batch_frames(
    data: episodes.Episodes, config, size: int, rng: np.random.Generator
) -> tuple[Tensor, int]:
    """Return frames then maps [N, 3, H, W] in [-1, 1], and how many are frames."""
    num_maps = int(size * MAP_SHARE)
    rows = rng.integers(data.num_episodes, size=size)
    columns = rng.integers(data.frames.shape[1], size=size)
    num_frames = size - num_maps
    frames = data.frames[rows[:num_frames], columns[:num_frames]]
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    poses = torch.from_numpy(data.poses[rows[num_frames:], columns[num_frames:]]).repeat(1, 2)
    maps = pose_maps(poses, data, config)
    return torch.cat((pictures / 127.5 - 1, maps)), num_frames


def pose_maps(poses: Tensor, data: episodes.Episodes, config) -> Tensor:
    """Return the trajectory maps [B, 3, H, W] in [-1, 1] of single poses [B, 16]."""
    intrinsic, w2c = torch.from_numpy(data.intrinsic), torch.linalg.inv(torch.from_numpy(data.c2w))
    camera = intrinsic[None, None], w2c[None, None, None]
    drawn = draw_maps(poses[:, None], *camera, config.maps, config.image_size)
    return normalize_maps(drawn)[:, 0, 0]


def foreground(frames: Tensor, background: Tensor) -> Tensor:
    """Per-pixel weight [N, 1, H, W], mean about 1: more where a frame differs from the median."""
    different = ((frames - background).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1 + FOREGROUND_WEIGHT * different
    return weight / weight.mean()


def train(data: episodes.Episodes, config, *, steps: int, batch: int, lr: float, seed: int):
    """Return the trained autoencoder and the reconstruction error of its last 100 steps."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Autoencoder(config.autoencoder).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    ema = training.Ema(model, 0.995)
    sample, _ = batch_frames(data, config, 256, rng)
    background = sample[: int(256 * (1 - MAP_SHARE))].median(0).values
    errors: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        training.set_lr(optimizer, training.cosine_lr(step, steps, lr, warmup=100))
        images, num_frames = batch_frames(data, config, batch, rng)
        mean, logvar = model.encode(images.to(memory_format=torch.channels_last))
        noise = LATENT_NOISE * mean.detach().std() + (0.5 * logvar).exp()
        decoded = model.decode(mean + noise * torch.randn_like(mean))
        weight = torch.ones_like(images[:, :1])
        weight[:num_frames] = foreground(images[:num_frames], background)
        error = (weight * (decoded - images).abs()).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        errors.append(float(error))
        if (step + 1) % 100 == 0:
            rate = (step + 1) / (time.perf_counter() - began)
            logging.info(
                "step %d/%d  error %.4f  %.2f steps/s",
                step + 1,
                steps,
                np.mean(errors[-100:]),
                rate,
            )
    ema.swap(model)
    return model.eval(), float(np.mean(errors[-100:]))


@torch.inference_mode()
def score(model: Autoencoder, data: episodes.Episodes, config, *, seed: int) -> dict[str, float]:
    """PSNR in dB of frames and maps, and the spread of the latents, on 512 pictures."""
    images, num_frames = batch_frames(data, config, 512, np.random.default_rng(seed))
    mean = torch.cat([model.encode(part)[0] for part in images.split(64)])
    decoded = torch.cat([model.decode(part) for part in mean.split(64)]).clamp(-1, 1)

    def psnr(a: Tensor, b: Tensor) -> float:
        return float(10 * torch.log10(4 / (a - b).square().mean()))

    return {
        "psnr_frames": psnr(decoded[:num_frames], images[:num_frames]),
        "psnr_maps": psnr(decoded[num_frames:], images[num_frames:]),
        "latent_std": float(mean[:num_frames].std()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder written by evac_jax.tools.collect")
    parser.add_argument("--out", required=True, help="folder for autoencoder.safetensors")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    data = episodes.load(Path(args.data))
    train_part, held_out = data.split()
    began = time.perf_counter()
    model, error = train(
        train_part, WORLD_MODEL, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed
    )
    scores = score(model, held_out, WORLD_MODEL, seed=args.seed)
    # Latents are stored with unit spread, as the denoiser's noise has.
    config = WORLD_MODEL.autoencoder.replace(scale_factor=round(1 / scores["latent_std"], 5))
    model.config = config
    out = Path(args.out)
    checkpoint.save_model(out, model)
    facts = cards.card(scores=scores, train_error=error, seconds=time.perf_counter() - began)
    cards.write_json(out / "card.json", facts)
    logging.info("held-out: %s", scores)


if __name__ == "__main__":
    main()
