"""The world model: one chunk of poses in, one chunk of frames out; the history is on the device.

Only results that are used are computed. A start frame is encoded once. Maps are drawn and encoded
only for the frames of the chunk. Only new frames are decoded. The image tower sees only start
frames. The history is a preallocated tensor with a length per environment, so environments may be
at different chunks of their episodes.

Source: specification of EnerVerse-AC's `inference` and RLinf's `EvacEnv`. Deliberate differences:
1. posterior means instead of posterior samples, so conditioning is deterministic;
2. every environment is conditioned on its own start image.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.conditioning import (
    concat_channels,
    image_condition,
    ray_channels,
    window_deltas,
)
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.image_tower import ImageTower
from evac_jax.evac.resampler import Resampler
from evac_jax.evac.sampler import guide, solve
from evac_jax.evac.trajectory_maps import draw_maps, normalize_maps
from evac_jax.evac.unet import UNet


@dataclass(frozen=True)
class Camera:
    """The cameras of the views.

    Attributes:
        intrinsic: [B or 1, V, 3, 3], pixels of the model's image size.
        c2w: camera to world, metres; [B or 1, V, 4, 4] for a fixed camera, or
            [B or 1, V, n_previous + chunk, 4, 4] along a pose window.
    """

    intrinsic: Tensor
    c2w: Tensor

    def along(self, frames: int) -> Tensor:
        """Camera-to-world matrices [B or 1, V, frames, 4, 4]."""
        if self.c2w.dim() == 5:
            return self.c2w
        return self.c2w[:, :, None].expand(-1, -1, frames, -1, -1)


@dataclass(frozen=True)
class EvacState:
    """What the model remembers of B episodes; the tensors are overwritten in place.

    Attributes:
        latents: [B, L, V, 4, h, w]: the start latent n_previous times, then the imagined latents
            in order.
        c2w: [B, L, V, 4, 4] cameras of the same frames.
        tokens: [B, 2, V, tokens, width] image tokens of the start frame: of the given frame, for
            the first chunk, and of its reconstruction by the autoencoder, for later chunks.
        length: [B] int64 on the host; frames stored, 0 before the first chunk.
    """

    latents: Tensor
    c2w: Tensor
    tokens: Tensor
    length: Tensor


@dataclass(frozen=True)
class Conditioning:
    """All inputs of the denoiser for one chunk besides the noisy latents.

    Attributes:
        history: [B, V, 4, n_previous, h, w] clean latents.
        concat: [B, V, 15, T, h, w] see `conditioning.concat_channels`.
        context: [B, V, image tokens + action tokens, width].
    """

    history: Tensor
    concat: Tensor
    context: Tensor


class EvacModel(nn.Module):
    """The five networks of an EVAC checkpoint and the procedure that connects them.

    Submodules have the checkpoint's names: `model.diffusion_model` (UNet), `first_stage_model`
    (autoencoder), `cond_stage_model` (action resampler), `image_proj_model` (image resampler),
    `embedder` (image tower).
    """

    def __init__(self, config: EvacConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"diffusion_model": UNet(config.unet)})
        self.first_stage_model = Autoencoder(config.autoencoder)
        self.cond_stage_model = Resampler(config.action_resampler)
        self.image_proj_model = Resampler(
            replace(config.image_resampler, num_queries=config.image_tokens)
        )
        self.embedder = ImageTower(config.image_tower)

    @property
    def unet(self) -> UNet:
        """The denoiser."""
        return self.model["diffusion_model"]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    # Parts, shared with training.

    def encode(self, frames: Tensor) -> Tensor:
        """Scaled posterior means [..., 4, h, w] of frames [..., 3, H, W] in [-1, 1]."""
        flat = self.first_stage_model.encode_mean_scaled(frames.flatten(0, -4))
        return flat.unflatten(0, frames.shape[:-3])

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [..., 3, H, W], not clamped, of scaled latents [..., 4, h, w]."""
        flat = self.first_stage_model.decode_scaled(latents.flatten(0, -4).to(self._dtype))
        return flat.unflatten(0, latents.shape[:-3])

    def encode_maps(self, poses: Tensor, intrinsic: Tensor, c2w: Tensor) -> Tensor:
        """Latents [B, V, 4, n, h, w] of the trajectory maps of poses [B, n, 16].

        Args:
            poses: see `trajectory_maps.draw_maps`.
            intrinsic: [B or 1, V, 3, 3].
            c2w: [B or 1, V, n or 1, 4, 4].
        """
        w2c = torch.linalg.inv(c2w.double()).float()
        maps = draw_maps(poses, intrinsic, w2c, self.config.maps, self.config.image_size)
        return self.encode(normalize_maps(maps).to(self._dtype)).transpose(2, 3)

    def image_tokens(self, frames: Tensor) -> Tensor:
        """Context tokens [..., tokens, width] of conditioning frames [..., 3, H, W]."""
        flat = self.image_proj_model(self.embedder(frames.flatten(0, -4)))
        return flat.unflatten(0, frames.shape[:-3])

    def join_context(self, image_tokens: Tensor, deltas: Tensor) -> Tensor:
        """[B, V, tokens, width]: image tokens [B, V, ...], then those of deltas [B, n, 14]."""
        action = self.cond_stage_model(deltas.to(self._dtype))[:, None]
        return torch.cat((image_tokens, action.expand(-1, image_tokens.shape[1], -1, -1)), 2)

    def rays(self, intrinsic: Tensor, c2w: Tensor) -> Tensor:
        """Ray channels [B or 1, V, 6, T, h, w] at latent resolution."""
        return ray_channels(intrinsic, c2w, self.config.image_size, self.config.latent_size)

    # Imagination.

    @torch.no_grad()
    def start(self, frames: Tensor, capacity_chunks: int) -> EvacState:
        """Begin B episodes.

        Args:
            frames: [B, V, 3, H, W] start frames in [-1, 1].
            capacity_chunks: chunks that an episode may have before it restarts.
        """
        config = self.config
        batch, views = frames.shape[:2]
        places = config.n_previous + capacity_chunks * config.chunk
        channels, latent_size = config.autoencoder.latent_channels, config.latent_size
        tokens = (config.image_tokens, config.unet.context_dim)
        state = EvacState(
            latents=frames.new_zeros(batch, places, views, channels, *latent_size),
            c2w=frames.new_zeros(batch, places, views, 4, 4, dtype=torch.float32),
            tokens=frames.new_zeros(batch, 2, views, *tokens),
            length=torch.zeros(batch, dtype=torch.long),
        )
        return self.restart(state, frames, torch.ones(batch, dtype=torch.bool))

    @torch.no_grad()
    def restart(self, state: EvacState, frames: Tensor, mask: Tensor) -> EvacState:
        """Begin new episodes in the masked environments; the others are unchanged.

        Args:
            state: overwritten in place.
            frames: [B, V, 3, H, W] start frames; entries outside the mask are not read.
            mask: [B] bool, preferably on the host.
        """
        rows = mask.cpu().nonzero().squeeze(1)
        if len(rows) == 0:
            return state
        on_device = rows.to(state.latents.device)
        frames = frames[on_device].to(self._dtype)
        latents = self.encode(frames)
        again = self.decode(latents).clamp(-1, 1)
        state.latents[on_device, : self.config.n_previous] = latents[:, None].to(state.latents)
        state.tokens[on_device] = torch.stack(
            (self.image_tokens(frames), self.image_tokens(again)), 1
        ).to(state.tokens)
        length = state.length.clone()
        length[rows] = 0
        return replace(state, length=length)

    @torch.no_grad()
    def imagine(
        self,
        state: EvacState,
        poses: Tensor,
        camera: Camera,
        *,
        steps: int,
        eta: float,
        noise: Tensor | None = None,
        generator: torch.Generator | Callable[[int], Tensor] | None = None,
        rows: Tensor | None = None,
        deltas: Tensor | None = None,
        guidance: float = 1.0,
        solver: str = "ddim",
        decoded: int = 0,
    ) -> tuple[EvacState, Tensor]:
        """Imagine one chunk.

        Args:
            state: overwritten in place.
            poses: [B, n_previous + chunk, 16] left then right arm, each xyz (metres), quaternion
                xyzw, gripper reading.
            camera: of the same environments.
            steps: denoising steps.
            eta: 0 = deterministic given the start noise, 1 = ancestral sampling.
            noise: [B, V, 4, chunk, h, w] start noise; None draws it from `generator`.
            generator: source of randomness on the model's device; None is torch's default one. It
                may be a function that gives the noise of a step (see `sampler.sample`); then
                `noise` is required.
            rows: [b] environments to imagine; all other arguments and the returned frames then
                have b entries instead of B.
            deltas: [B, n, 14] replaces the deltas computed from `poses`; used only for golden
                vectors of upstream's `inference`, see `tests.parity.evac_upstream`.
            guidance: classifier-free guidance scale; 1 is none, and the only tested choice for
                the RLinf weights.
            solver: see `sampler.solve`.
            decoded: how many of the chunk's last frames to decode and return; 0 = all. The others
                remain in the history as latents (see `decode_history`).

        Returns:
            The state with the chunk appended, and frames [B, V, chunk or decoded, 3, H, W],
            about [-1, 1] and not clamped.

        Raises:
            ValueError: when an environment has no room for another chunk.
        """
        rows = torch.arange(len(state.length)) if rows is None else rows.cpu()
        chunk = self.config.chunk
        self._check_room(state, rows)
        conditioning = self.condition(state, poses, camera, rows=rows, deltas=deltas)
        if noise is None:
            shape = (*conditioning.history.shape[:3], chunk, *conditioning.history.shape[4:])
            noise = torch.randn(shape, generator=generator, device=self.device)
        latents = self.denoise(conditioning, noise, steps, eta, generator, guidance, solver)
        new = latents.permute(0, 3, 1, 2, 4, 5)  # [b chunk V 4 h w]
        shown = new[:, chunk - (decoded or chunk) :]
        return self._append(state, rows, new, camera), self.decode(shown).transpose(1, 2)

    @torch.no_grad()
    def decode_history(self, state: EvacState, rows: Tensor, begin: int, end: int) -> Tensor:
        """Decode frames of the history; return [b, V, begin - end, 3, H, W].

        Args:
            state: holds the history.
            rows: [b] environments.
            begin: the first frame, counted back from the end of each history (1 is the last frame).
            end: the frame after the last one, counted in the same way.
        """
        rows = rows.cpu()
        places = state.length[rows][:, None] - torch.arange(begin, end, -1)
        here = state.latents.device
        latents = state.latents[rows[:, None].to(here), places.to(here)]  # [b n V 4 h w]
        return self.decode(latents).transpose(1, 2)

    def _append(self, state: EvacState, rows: Tensor, latents: Tensor, camera: Camera) -> EvacState:
        """Append a chunk [b, chunk, V, 4, h, w] to the history of each of `rows`."""
        past, chunk = self.config.n_previous, self.config.chunk
        here = latents.device
        c2w = camera.along(past + chunk).transpose(1, 2).to(state.c2w)
        c2w = c2w.expand(len(rows), -1, -1, -1, -1)
        first = state.length[rows] == 0
        state.c2w[rows[first].to(here), :past] = c2w[first.to(here), :past]
        begin = state.length[rows].clamp(min=past)
        places = (begin[:, None] + torch.arange(chunk)).to(here)
        index = (rows[:, None].to(here), places)
        state.latents[index] = latents.to(state.latents)
        state.c2w[index] = c2w[:, past:]
        length = state.length.clone()
        length[rows] = begin + chunk
        return replace(state, length=length)

    def condition(
        self,
        state: EvacState,
        poses: Tensor,
        camera: Camera,
        *,
        rows: Tensor | None = None,
        deltas: Tensor | None = None,
    ) -> Conditioning:
        """The denoiser's conditioning for the next chunk; arguments as in `imagine`."""
        rows = torch.arange(len(state.length)) if rows is None else rows.cpu()
        past, chunk = self.config.n_previous, self.config.chunk
        here = state.latents.device
        length = state.length[rows]
        index = (rows[:, None].to(here), history_places(length, past).to(here))
        first = (length == 0).to(here)
        history = state.latents[index].permute(0, 2, 3, 1, 4, 5)  # [b V 4 P h w]
        cameras = camera.along(past + chunk)
        stored = state.c2w[index].transpose(1, 2)  # [b V P 4 4]
        before = torch.where(first[:, None, None, None, None], cameras[:, :, :past], stored)
        ahead = cameras[:, :, past:]
        c2w = torch.cat((before, ahead.expand(len(rows), -1, -1, -1, -1)), 2)
        concat = concat_channels(
            image_condition(history, chunk),
            self.encode_maps(poses[:, past:], camera.intrinsic, ahead),
            self.rays(camera.intrinsic, c2w).to(history),
            history.new_ones(1),
        )
        tokens = state.tokens[rows.to(here), (length > 0).long().to(here)]
        if deltas is None:
            deltas = window_deltas(poses, self.config)
        return Conditioning(history, concat, self.join_context(tokens, deltas))

    @torch.no_grad()
    def denoise(
        self,
        conditioning: Conditioning,
        noise: Tensor,
        steps: int,
        eta: float,
        generator: torch.Generator | Callable[[int], Tensor] | None = None,
        guidance: float = 1.0,
        solver: str = "ddim",
    ) -> Tensor:
        """Latents [B, V, 4, chunk, h, w] of a chunk from noise of the same shape.

        They are float32 whatever the dtype of the networks: if they were rounded to 16 bits after
        every step, the change of a small step would be lost.
        """
        batch, views = noise.shape[:2]
        branches = [conditioning]
        if guidance != 1.0:
            branches.append(self.unconditional(conditioning))
        prepared = [
            (b.concat.flatten(0, 1), self.unet.prepare_context(b.context.flatten(0, 1), views))
            for b in branches
        ]

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            x = x.to(self._dtype)
            outputs = [self.velocity(x, timesteps, *given).float() for given in prepared]
            return outputs[0] if len(outputs) == 1 else guide(*outputs, guidance)

        latents = solve(
            solver,
            self.config,
            predict,
            conditioning.history.flatten(0, 1).float(),
            noise.flatten(0, 1).float(),
            steps=steps,
            eta=eta,
            generator=generator,
        )
        return latents.unflatten(0, (batch, views))

    def velocity(
        self,
        x: Tensor,
        timesteps: Tensor,
        concat: Tensor,
        context,
        *,
        fps: Tensor | None = None,
        domain_id: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's v for latents [BV, 4, T, h, w] and their conditioning.

        Args:
            x: clean history, followed by the noisy chunk.
            timesteps: [BV] int64 of the chunk frames.
            concat: [BV, 15, T, h, w].
            context: result of `unet.prepare_context`, or plain tokens [BV, tokens, width].
            fps: [BV] or [1] instead of the configuration's.
            domain_id: [BV] or [1] instead of the configuration's.
        """
        config = self.config
        if fps is None:
            fps = torch.full_like(timesteps[:1], int(config.fps))
        if domain_id is None:
            domain_id = torch.full_like(timesteps[:1], config.domain_id)
        return self.unet(
            torch.cat((x, concat), 1),
            timesteps,
            context,
            fps=fps,
            domain_id=domain_id,
            n_history=config.n_previous,
            n_view=config.n_view,
        )

    def unconditional(self, conditioning: Conditioning) -> Conditioning:
        """The branch that guidance moves away from: no start image, no image condition."""
        chunk, count = self.config.chunk, self.config.image_tokens
        blank = conditioning.history.new_zeros(1, 1, 3, *self.config.image_size)
        tokens = self.image_tokens(blank).expand(*conditioning.context.shape[:2], -1, -1)
        context = torch.cat((tokens, conditioning.context[:, :, count:]), 2)
        concat = conditioning.concat.clone()
        latent = self.config.autoencoder.latent_channels
        concat[:, :, : latent + 1, -chunk:] = 0  # image condition and mask
        return Conditioning(conditioning.history, concat, context)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _check_room(self, state: EvacState, rows: Tensor) -> None:
        places = state.latents.shape[1]
        longest = int(state.length[rows].clamp(min=self.config.n_previous).max())
        if longest + self.config.chunk > places:
            raise ValueError(
                f"an episode has {longest} frames in a history of {places}; restart it or call "
                "start() with a larger capacity_chunks"
            )


def history_places(length: Tensor, n_previous: int) -> Tensor:
    """[B, n_previous] indices of the stored frames that condition the next chunk.

    floor(n i / (n_previous - 1)) for i = 0 .. n_previous - 2, then the last frame; n is the stored
    length [B]. The first chunk (n = 0) reads index 0, the start frame.
    """
    spread = torch.arange(n_previous - 1, device=length.device)
    early = length[:, None] * spread // (n_previous - 1)
    return torch.cat((early, (length[:, None] - 1).clamp(min=0)), 1)
