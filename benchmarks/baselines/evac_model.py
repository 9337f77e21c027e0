"""EVAC's imagination with the repeated work of the public code, on a copy of our modules.

It does the work that our model avoids. In the first chunk all frames are encoded, although they are
the same picture. The maps of the history are drawn and encoded, although their latents are set to
zero. History frames are decoded again in every chunk. The image tower sees the same start frame in
every chunk. The autoencoder encodes frames in pairs and decodes them one by one; its attention is
written as separate operations. The denoiser is `evac_unet`. Latents are posterior means, so that
both paths give equal results.

Source: specification of EnerVerse-AC, sections 3 (procedure) and 12 (inefficiencies).
"""

import copy

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from benchmarks.baselines.evac_unet import unet_forward
from evac_jax.evac.conditioning import concat_channels, image_condition, window_deltas
from evac_jax.evac.model import Camera, EvacModel
from evac_jax.evac.sampler import ddim_update
from evac_jax.evac.schedule import ddim_table
from evac_jax.evac.trajectory_maps import draw_maps, normalize_maps


class NaiveEvac:
    """Imagines chunk after chunk of B episodes of one view.

    Args:
        model: not packed; its modules are copied.
        start: frames [B, 3, H, W] in [-1, 1].
    """

    def __init__(self, model: EvacModel, start: Tensor):
        self.model = copy.deepcopy(model)
        self.model.first_stage_model.kl.set_attn_processor(AttnProcessor())
        self.config = model.config
        self.restart(start)

    def restart(self, start: Tensor) -> None:
        """Begin other episodes."""
        self.frames = start[:, None]  # [B n 3 H W], the whole history
        self.latents: Tensor | None = None  # [B 4 n h w], the whole history
        self.poses: Tensor | None = None  # [B n 16], the whole history

    # Separate methods, so that a benchmark can time them.

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, 4, n, h, w] of frames [B, n, 3, H, W], two frames per call."""
        parts = frames.flatten(0, 1).split(2)
        latents = torch.cat([self.model.first_stage_model.encode_mean_scaled(p) for p in parts])
        return latents.unflatten(0, frames.shape[:2]).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, n, 3, H, W] of latents [B, 4, n, h, w], one frame per call."""
        parts = latents.transpose(1, 2).flatten(0, 1).split(1)
        frames = torch.cat([self.model.first_stage_model.decode_scaled(p) for p in parts])
        return frames.unflatten(0, (len(latents), -1))

    def tower(self, frames: Tensor) -> Tensor:
        """Image tokens [B, tokens, width] of frames [B, 3, H, W]."""
        return self.model.image_proj_model(self.model.embedder(frames))

    def denoiser(self, x: Tensor, time: int, concat: Tensor, context: Tensor) -> Tensor:
        """Return v of latents x [B, 4, T, h, w], history included."""
        config = self.config
        shape = (len(x), config.frames)
        times = torch.full(shape, time)
        times[:, : config.n_previous] = 0
        fps, domain = torch.full(shape, int(config.fps)), torch.full(shape, config.domain_id)
        return unet_forward(self.model.unet, torch.cat((x, concat), 1), times, context, fps, domain)

    @torch.no_grad()
    def imagine(self, poses: Tensor, camera: Camera, noise: list[Tensor], eta: float) -> Tensor:
        """Imagine one chunk.

        Args:
            poses: [B, n_previous + chunk, 16].
            camera: at rest, shared by all episodes.
            noise: [B, 4, chunk, h, w] each: the start noise, then the noise of each step in order;
                so there are `len(noise) - 1` steps.
            eta: see `sampler.sample`.

        Returns:
            frames [B, chunk, 3, H, W].
        """
        config, past, chunk = self.config, self.config.n_previous, self.config.chunk
        first, total = self.latents is None, self.config.frames
        if first:
            clean = self.encode(self.frames.expand(-1, total, -1, -1, -1).contiguous())
            seen, drawn = self.frames[:, 0], poses
        else:
            stored = self.latents.shape[2]
            index = [stored * i // (past - 1) for i in range(past - 1)] + [stored - 1]
            clean = self.latents[:, :, index]
            seen = self.frames[:, 0].clamp(-1, 1)
            drawn = torch.cat((self.poses[:, index], poses[:, past:]), 1)
        c2w = camera.along(total)
        w2c = torch.linalg.inv(c2w.double()).float()
        maps = draw_maps(drawn, camera.intrinsic, w2c, config.maps, config.image_size)
        encoded = self.encode(normalize_maps(maps)[:, 0])[:, None]
        history = clean[:, None, :, :past]
        rays = self.model.rays(camera.intrinsic, c2w)
        concat = concat_channels(
            image_condition(history, chunk),
            encoded[:, :, :, past:],
            rays.expand(len(poses), -1, -1, -1, -1, -1),
            history.new_ones(1),
        )[:, 0]
        actions = self.model.cond_stage_model(window_deltas(poses, config))
        context = torch.cat((self.tower(seen), actions), 1)
        table, history = ddim_table(config, len(noise) - 1, eta), history[:, 0]
        x = torch.cat((history, noise[0]), 2)
        for index in range(len(table.timesteps) - 1, -1, -1):
            v = self.denoiser(x, int(table.timesteps[index]), concat, context)
            fresh = torch.cat((torch.zeros_like(history), noise[len(table.timesteps) - index]), 2)
            x, _ = ddim_update(x, v, index, table, fresh)
            x[:, :, :past] = history
        frames = self.decode(x)
        new = slice(0 if first else past, None)
        self.latents = x if first else torch.cat((self.latents, x[:, :, new]), 2)
        self.frames = frames if first else torch.cat((self.frames, frames[:, new]), 1)
        self.poses = poses if first else torch.cat((self.poses, poses[:, new]), 1)
        return frames[:, past:]
