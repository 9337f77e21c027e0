"""Trains an EVAC world model on episodes, from scratch or from earlier weights.

The autoencoder is frozen and its latents are cached, so a step costs the denoiser alone. Windows
follow the history rule of imagination: the frames that a rollout would remember, not simply the
last ones.

    python -m evac_jax.tools.train_world_model --data DIR --autoencoder DIR --out DIR --steps 8000
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from absl import logging
from torch import Tensor

from evac_jax.evac import checkpoint
from evac_jax.evac.conditioning import window_deltas
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import Camera, EvacModel, history_places
from evac_jax.evac.schedule import Schedule
from evac_jax.evac.training import LossOptions, TrainingBatch, training_loss
from evac_jax.miniature.sizes import WORLD_MODEL
from evac_jax.tools import cards, episodes, training

# A latent cell that moved by this much (latents have unit spread) against the last history frame
# shows what the action did; the table around it would otherwise drown it.
MOVED = 0.5
EPISODE_STARTS = 0.5  # share of windows that begin where episodes do, as rollouts do


@dataclass(frozen=True)
class Cache:
    """Episodes as the denoiser needs them.

    Attributes:
        latents, map_latents: float16 [N, F, 4, h, w] of every frame and of its trajectory map.
        frames: uint8 [N, F, H, W, 3].
        poses: float32 [N, F, 8].
        camera: shared by all.
    """

    latents: Tensor
    map_latents: Tensor
    frames: np.ndarray
    poses: Tensor
    camera: Camera

    def __len__(self) -> int:
        return len(self.latents)


def camera_of(data: episodes.Episodes) -> Camera:
    """Return the resting camera of recorded episodes."""
    matrices = (torch.from_numpy(np.array(m))[None, None] for m in (data.intrinsic, data.c2w))
    return Camera(*matrices)


def to_images(frames: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] to float [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).movedim(-1, -3).float() / 127.5 - 1


@torch.inference_mode()
def build_cache(model: EvacModel, data: episodes.Episodes, batch: int = 16) -> Cache:
    """Encode every frame and draw and encode every trajectory map, once."""
    camera = camera_of(data)
    latents, maps = [], []
    for first in range(0, data.num_episodes, batch):
        rows = slice(first, first + batch)
        latents.append(model.encode(to_images(data.frames[rows])).half())
        poses = torch.from_numpy(np.array(data.poses[rows])).repeat(1, 1, 2)
        drawn = model.encode_maps(poses, camera.intrinsic, camera.c2w[:, :, None])
        maps.append(drawn[:, 0].transpose(1, 2).half())
    return Cache(
        latents=torch.cat(latents),
        map_latents=torch.cat(maps),
        frames=data.frames,
        poses=torch.from_numpy(np.array(data.poses)),
        camera=camera,
    )


def windows(config: EvacConfig, num_frames: int, size: int, rng: np.random.Generator):
    """Draw windows: episode start [B] and frame numbers [B, n_previous + chunk] for latents.

    A window of chunk number k from start s remembers what `imagine` would: n_previous copies of
    frame s are stored first, then s + 1, s + 2 and so on.
    """
    past, chunk = config.n_previous, config.chunk
    most = (num_frames - 1) // chunk
    number = rng.integers(most, size=size)
    room = num_frames - 1 - (number + 1) * chunk
    start = np.where(rng.random(size) < EPISODE_STARTS, 0, rng.integers(0, room + 1))
    stored = np.where(number == 0, 0, past + number * chunk)
    places = history_places(torch.from_numpy(stored), past).numpy()
    history = start[:, None] + np.maximum(places - (past - 1), 0)
    ahead = (start + number * chunk)[:, None] + 1 + np.arange(chunk)
    return start, np.concatenate((history, ahead), axis=1)


def make_batch(cache: Cache, config: EvacConfig, size: int, rng, rays: Tensor) -> TrainingBatch:
    """Gather a batch of windows from the cache."""
    rows = rng.integers(len(cache), size=size)
    start, columns = windows(config, cache.frames.shape[1], size, rng)
    past = config.n_previous
    # The pose window is contiguous, its beginning held at the episode's start.
    now = columns[:, past] - 1
    window = now[:, None] + np.arange(1 - past, config.chunk + 1)
    window = np.maximum(window, start[:, None])
    row = torch.from_numpy(rows)[:, None]
    poses = cache.poses[row, torch.from_numpy(window)].repeat(1, 1, 2)
    latents = cache.latents[row, torch.from_numpy(columns)].float()
    maps = cache.map_latents[row, torch.from_numpy(columns[:, past:])].float()
    return TrainingBatch(
        latents=latents.transpose(1, 2)[:, None],
        map_latents=maps.transpose(1, 2)[:, None],
        rays=rays,
        deltas=window_deltas(poses, config),
        images=to_images(cache.frames[rows, start])[:, None, None],
    )


def moving_weight(batch: TrainingBatch, config: EvacConfig, moving: float) -> Tensor:
    """Weight of every latent cell of the chunk, mean 1: `moving` times more where it moved."""
    past = config.n_previous
    last = batch.latents[:, :, :, past - 1 : past]
    change = (batch.latents[:, :, :, past:] - last).abs().amax(2, keepdim=True)
    weight = 1 + (moving - 1) * (change > MOVED).float()
    return weight / weight.mean()


@torch.inference_mode()
def imagine_episodes(
    model: EvacModel, data: episodes.Episodes, *, steps: int, eta: float, generator: torch.Generator
) -> Tensor:
    """Imagine episodes from their first frame with their own poses: frames [N, T, 3, H, W]."""
    past, chunk = model.config.n_previous, model.config.chunk
    poses = torch.from_numpy(np.array(data.poses)).repeat(1, 1, 2)
    poses = torch.cat((poses[:, :1].expand(-1, past - 1, -1), poses), 1)
    chunks = (data.frames.shape[1] - 1) // chunk
    state = model.start(to_images(data.frames[:, :1]), chunks)
    frames = []
    for k in range(chunks):
        window = poses[:, k * chunk : k * chunk + past + chunk]
        state, imagined = model.imagine(
            state, window, camera_of(data), steps=steps, eta=eta, generator=generator
        )
        frames.append(imagined[:, 0])
    return torch.cat(frames, 1)


def rollout_psnr(
    model: EvacModel, data: episodes.Episodes, *, steps: int, eta: float, count: int, seed: int
) -> list[float]:
    """PSNR (dB) of each chunk of `count` imagined episodes."""
    generator = torch.Generator().manual_seed(seed)
    part = data[:count]
    imagined = imagine_episodes(model, part, steps=steps, eta=eta, generator=generator)
    error = (imagined.clamp(-1, 1) - to_images(part.frames[:, 1:])).square()
    per_chunk = error.unflatten(1, (-1, model.config.chunk)).mean((0, 2, 3, 4, 5))
    return (10 * torch.log10(4 / per_chunk)).tolist()


def train(model: EvacModel, cache: Cache, held_out: episodes.Episodes, args) -> list[dict]:
    """Run the optimisation, resuming from `<out>/progress.pt` when it is there."""
    config, out = model.config, Path(args.out)
    torch.manual_seed(args.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    ema = training.Ema(model, args.ema)
    schedule = Schedule.create(config, torch.device("cpu"))
    rays = model.rays(cache.camera.intrinsic, cache.camera.along(config.frames))
    options = LossOptions(dropout=args.dropout)
    done, history = 0, []
    progress = out / "progress.pt"
    if progress.exists():
        saved = torch.load(progress, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])
        done, history = saved["step"], saved["history"]
        logging.info("resumed at step %d", done)
    began, losses = time.perf_counter(), []
    for step in range(done, args.steps):
        # One generator per step: a resumed run sees the batches that an unbroken one would have.
        rng = np.random.default_rng((args.seed, step))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        training.set_lr(optimizer, training.cosine_lr(step, args.steps, args.lr, args.warmup))
        batch = make_batch(cache, config, args.batch, rng, rays)
        loss = training_loss(
            model,
            batch,
            options=options,
            generator=generator,
            weight=moving_weight(batch, config, args.moving_weight),
            schedule=schedule,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update(model)
        losses.append(float(loss.detach()))
        if (step + 1) % args.log_every == 0:
            rate = (step + 1 - done) / (time.perf_counter() - began)
            mean = float(np.mean(losses[-args.log_every :]))
            logging.info("step %d/%d  loss %.4f  %.2f steps/s", step + 1, args.steps, mean, rate)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            ema.swap(model)
            psnr = rollout_psnr(
                model.eval(), held_out, steps=args.ddim_steps, eta=args.eta, count=48, seed=0
            )
            checkpoint.save_model(out, model)
            ema.swap(model.train())
            history.append({"step": step + 1, "loss": float(np.mean(losses[-200:])), "psnr": psnr})
            logging.info("held-out PSNR per chunk: %s", " ".join(f"{x:.1f}" for x in psnr))
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": step + 1,
                "history": history,
            }
            training.save_progress(progress, state)
    return history


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, nargs="+", help="folders of episodes")
    parser.add_argument("--autoencoder", help="folder of train_autoencoder; not with --start")
    parser.add_argument("--start", help="folder of a world model to go on from (fine-tuning)")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.997)
    parser.add_argument("--dropout", type=float, default=0.05, help="p of the condition dropout")
    parser.add_argument("--moving_weight", type=float, default=5.0)
    parser.add_argument("--ddim_steps", type=int, default=4, help="of the validation roll-outs")
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--save_every", type=int, default=500)
    parser.add_argument("--log_every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    if bool(args.autoencoder) == bool(args.start):
        parser.error("give either --autoencoder (from scratch) or --start (fine-tuning)")
    began = time.perf_counter()
    if args.start:
        model = checkpoint.load_model(Path(args.start))
    else:
        autoencoder = checkpoint.load_model(Path(args.autoencoder))
        model = EvacModel(WORLD_MODEL.replace(autoencoder=autoencoder.config))
        model.first_stage_model.load_state_dict(autoencoder.state_dict())
    model.first_stage_model.requires_grad_(False)
    data = episodes.load(*(Path(folder) for folder in args.data))
    train_part, held_out = data.split()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    cache = build_cache(model, train_part)
    logging.info("cached %d episodes in %.0f s", len(cache), time.perf_counter() - began)
    history = train(model, cache, held_out, args)
    facts = cards.card(episodes=len(cache), history=history, seconds=time.perf_counter() - began)
    cards.write_json(out / "card.json", facts)


if __name__ == "__main__":
    main()
